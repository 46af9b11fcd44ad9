"""Running pruned models: packed linear layers, and packed checkpoints that Transformers loads."""
