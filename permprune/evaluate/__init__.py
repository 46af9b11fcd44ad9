"""Evaluation: what a model scores on a task, as one result type."""

from permprune.evaluate.perplexity import perplexity
from permprune.evaluate.result import Result

__all__ = ["Result", "perplexity"]
