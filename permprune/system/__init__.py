"""What permprune asks of the operating system."""
