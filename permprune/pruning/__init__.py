"""The pruned network: problems, masks, the pattern of each layer, and the folder that is written."""
