"""What a command does, from names to files."""
