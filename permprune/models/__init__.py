"""Models in memory: their layers, their inputs, and running them."""
