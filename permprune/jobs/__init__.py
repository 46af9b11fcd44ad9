"""The implementation of each command, from its arguments to the files that it writes."""
