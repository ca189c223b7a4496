"""What keeps a second copy of the weights."""
