"""What stands before or after a rule, whichever rule it is."""
