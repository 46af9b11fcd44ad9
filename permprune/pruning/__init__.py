"""The pruned network: problems, masks, patterns of layers, and the folder that is written."""
