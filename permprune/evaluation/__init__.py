"""How good a model is: perplexity, accuracy, word error rate, tasks, size."""
