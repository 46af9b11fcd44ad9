"""A pattern for each layer, under a budget of weights, of bytes or of loss."""
