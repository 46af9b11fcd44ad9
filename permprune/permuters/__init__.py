"""Permuters: the searches for an order of channels, one file a method."""
