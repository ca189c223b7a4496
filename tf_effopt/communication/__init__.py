"""What replicas exchange, and how it is chosen."""
