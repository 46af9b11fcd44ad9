"""Evaluation of models: perplexity, accuracy, word error rate, tasks, and size."""
