"""Evaluation: what a model scores on a task, as one result type."""

from permprune.evaluate.agreement import Answers, agreement, ask
from permprune.evaluate.classification import accuracy
from permprune.evaluate.dispatch import evaluate_model
from permprune.evaluate.perplexity import perplexity
from permprune.evaluate.probe import Probe, fit_probe
from permprune.evaluate.result import Result
from permprune.evaluate.speech import word_error_rate

__all__ = [
    "Answers",
    "Probe",
    "Result",
    "accuracy",
    "agreement",
    "ask",
    "evaluate_model",
    "fit_probe",
    "perplexity",
    "word_error_rate",
]
