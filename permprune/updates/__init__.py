"""Updates of the remaining weights, which compensate for the pruned ones; one file per method."""
