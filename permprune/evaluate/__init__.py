"""Evaluation: what a model scores on a task, as one result type."""

from permprune.evaluate.agreement import Answers, agreement, ask
from permprune.evaluate.classification import accuracy
from permprune.evaluate.dispatch import ACCURACY, evaluate_model, knows_right
from permprune.evaluate.lm_tasks import LoadedTasks, TaskList, evaluate_tasks
from permprune.evaluate.metrics import METRICS, measure_labels
from permprune.evaluate.perplexity import perplexity
from permprune.evaluate.probe import Probe, fit_probe, with_head
from permprune.evaluate.result import Result
from permprune.evaluate.speech import word_error_rate

__all__ = [
    "ACCURACY",
    "METRICS",
    "Answers",
    "LoadedTasks",
    "Probe",
    "Result",
    "TaskList",
    "accuracy",
    "agreement",
    "ask",
    "evaluate_model",
    "evaluate_tasks",
    "fit_probe",
    "knows_right",
    "measure_labels",
    "perplexity",
    "with_head",
    "word_error_rate",
]
