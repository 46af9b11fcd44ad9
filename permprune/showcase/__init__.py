"""What a run shows: a few examples of the evaluation data, answered by the dense and the pruned models."""
