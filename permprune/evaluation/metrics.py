"""Metrics of labels: accuracy, other metrics of classes, and correlations of scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.evaluation.batched import per_example
from permprune.evaluation.result import F1, MATTHEWS, PEARSON, SPEARMAN, TOP_1_ACCURACY, Metric, Result, share
from permprune.examples import IGNORED, Examples
from permprune.losses.targets import labelled, scored

RESAMPLES = 500
"""Number of resamples of the bootstrap."""


def accuracy(model: nn.Module, examples: Examples, batch: int = 32) -> Result:
    """Measure the share of predictions that equal the labels.

    The labels are classes of the examples or of their positions, each of which then counts as a prediction. The error
    is that of a binomial proportion. Raises `PermpruneError` for labels that the model has no logits for.
    """

    def right_and_counted(inputs: Examples) -> Tensor:
        predictions, counted = labelled(model, inputs), inputs["labels"] != IGNORED
        right = torch.zeros_like(counted)
        right[counted] = predictions.logits.argmax(-1) == predictions.labels
        return torch.stack([right.reshape(len(inputs), -1).sum(1), counted.reshape(len(inputs), -1).sum(1)])

    right, counts = per_example(model, examples, batch, right_and_counted, rows=2, what="accuracy")
    terms = right, counts
    return share("classification", TOP_1_ACCURACY, right=float(right.sum()), count=float(counts.sum()), terms=terms)


def _matthews(right: Any, predictions: Any) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(right, predictions))


def _f1(right: Any, predictions: Any) -> float:
    from sklearn.metrics import f1_score

    average = "binary" if max(right.max(), predictions.max()) < 2 else "macro"
    return float(f1_score(right, predictions, average=average, zero_division=0.0))


def _correlation(measure: Callable[[Any, Any], Any], right: Any, predictions: Any) -> float:
    constant = any(np.ptp(array) == 0 for array in (right, predictions))
    return 0.0 if constant else float(measure(right, predictions).statistic)


Measure = Callable[[Any, Any], float]
"""(targets, predictions), numpy arrays (count,) -> the value of a metric."""

OF_CLASSES: dict[str, tuple[Metric, Measure]] = {"matthews": (MATTHEWS, _matthews), "f1": (F1, _f1)}
"""Metrics of classes besides accuracy, by the names that `--metric` takes.

F1 is that of class 1 if there are two classes, and otherwise the mean over the classes.
"""

OF_SCORES: dict[str, tuple[Metric, Measure]] = {
    "pearson": (PEARSON, partial(_correlation, stats.pearsonr)),
    "spearman": (SPEARMAN, partial(_correlation, stats.spearmanr)),
}
"""Metrics of scores, by the names that `--metric` takes. A correlation with a constant counts as 0."""


def measure_labels(model: nn.Module, examples: Examples, metric: str | None = None, *, batch: int = 32) -> list[Result]:
    """Measure a model that predicts one class or one score for each example by one of `OF_CLASSES` or `OF_SCORES`.

    For scores the default is the Pearson correlation, and the other metrics of scores follow. The standard errors come
    from a bootstrap over the examples with a fixed seed. Raises `PermpruneError` if the metric does not fit the labels.
    """
    labels = examples["labels"]
    scores = labels.is_floating_point()
    fitting = OF_SCORES if scores else OF_CLASSES
    metric = next(iter(fitting)) if metric is None else metric
    if labels.dim() != 1:
        raise PermpruneError(f'the metric "{metric}" is one of labels, one for each example: leave it out')
    if metric not in fitting:
        kind = "one score for each example" if scores else "classes"
        offered = ", ".join(fitting if scores else ["accuracy", *fitting])
        raise PermpruneError(f'the metric "{metric}" does not fit {kind}: choose one of {offered}')

    def predicted(inputs: Examples) -> Tensor:
        if scores:
            return scored(model, inputs).values.T
        return labelled(model, inputs).logits.argmax(-1)[None]

    counted = examples[labels.ne(IGNORED).nonzero()[:, 0]]
    (predictions,) = per_example(model, counted, batch, predicted, rows=1, what="evaluating")
    right = counted["labels"].cpu().double()
    if scores:
        return correlations("regression", right, predictions, first=metric)
    return [bootstrapped("classification", *fitting[metric], right.numpy(), predictions.numpy())]


def correlations(task: str, scores: Tensor, predictions: Tensor, *, first: str) -> list[Result]:
    """Measure the correlations of predictions with scores, both fp64 (count,); the metric `first` comes first."""
    names = sorted(OF_SCORES, key=lambda name: name != first)
    return [bootstrapped(task, *OF_SCORES[name], scores.numpy(), predictions.numpy()) for name in names]


def bootstrapped(task: str, metric: Metric, measure: Measure, right: Any, predictions: Any) -> Result:
    """Return the metric of numpy arrays (count,); the resamples of its standard error depend on the count alone."""
    error = drawn = None
    if len(right) > 1:  # something to resample
        options: Any = {"vectorized": False, "n_resamples": RESAMPLES, "method": "percentile", "rng": 0}
        draws = stats.bootstrap((right, predictions), measure, paired=True, **options)
        error, drawn = float(draws.standard_error), draws.bootstrap_distribution
    return Result(task, metric, measure(right, predictions), count=len(right), stderr=error, draws=drawn)
