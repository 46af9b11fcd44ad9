"""Checkpoints on disk: reading and writing models, and the record of how one was pruned."""
