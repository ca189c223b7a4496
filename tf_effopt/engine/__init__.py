"""What an update is: pure functions, which know no backend, device or strategy."""
