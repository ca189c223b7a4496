"""What is kept per variable, and how; what is known of variables and tensors."""
