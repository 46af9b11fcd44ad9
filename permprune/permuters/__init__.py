"""Permuters: searches for an order of channels; one file per method."""
