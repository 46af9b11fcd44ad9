"""A step of Adam for the weights that a mask keeps, and stochastic rounding to bf16."""
