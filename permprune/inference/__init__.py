"""Running pruned models: packed linear layers, and checkpoints of them that Transformers loads."""
