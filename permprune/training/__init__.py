"""Training of whole models, of heads, or of the weights that pruning kept."""
