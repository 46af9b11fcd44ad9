"""The inner loops of the search for orders: masks of reordered columns, slopes, and the costs of moving channels."""
