"""Training weights: whole models, heads, or the weights that pruning kept."""
