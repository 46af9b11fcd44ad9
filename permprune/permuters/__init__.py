"""Permuters: searches for an order of channels."""
