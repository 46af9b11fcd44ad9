"""Updates: how the weights that stay make up for those pruned, one file a method."""
