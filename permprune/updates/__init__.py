"""Updates of the remaining weights, which compensate for the pruned ones."""
