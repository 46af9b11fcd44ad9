"""Packed keys and values, and attention to them."""
