"""Metrics of labels: accuracy, other metrics of classes, and correlations of scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.evaluation.result import (
    F1,
    MATTHEWS,
    PEARSON,
    SPEARMAN,
    TOP_1_ACCURACY,
    TOP_5_ACCURACY,
    Metric,
    Result,
    share,
)
from permprune.examples import IGNORED, Examples, batches, by_length
from permprune.losses.targets import Predictions, labelled, scored
from permprune.models.forward import frozen
from permprune.system import distributed
from permprune.system.device import compute_device
from permprune.system.progress import track

RESAMPLES = 500
"""Number of resamples of the bootstrap."""


@torch.inference_mode()
def accuracy(model: nn.Module, examples: Examples, batch: int = 32) -> list[Result]:
    """Measure the top-1 accuracy, and, with more than 5 classes, the top-5 accuracy.

    The labels are classes of the examples or of their positions, each of which then counts as a prediction. Standard
    errors are those of a binomial proportion. Raises `PermpruneError` for labels that the model has no logits for.
    """
    device = compute_device(model)
    parts, classes = list(enumerate(batches(examples, batch))), 0
    sums = torch.zeros(3, len(parts), dtype=torch.float64)
    with frozen(model):
        for place, inputs in track(distributed.share(parts), "accuracy"):
            predictions = labelled(model, inputs.to(device))
            assert predictions.labels is not None
            classes = predictions.logits.shape[-1]
            right = predictions.logits.topk(min(5, classes)).indices == predictions.labels[:, None]
            sums[:, place] = torch.tensor([right[:, 0].sum(), right.sum(), predictions.terms])
    distributed.add_([sums])
    first, five, count = sums.sum(1).tolist()
    results = [share("classification", TOP_1_ACCURACY, right=first, count=count, terms=(sums[0], sums[2]))]
    if classes > 5:
        results.append(share("classification", TOP_5_ACCURACY, right=five, count=count))
    return results


@dataclass(frozen=True)
class LabelMetric:
    """A metric, `measure(targets, predictions)`, of numpy arrays (count,): of classes, or of numbers if `scores`."""

    metric: Metric
    measure: Callable[[Any, Any], float]
    scores: bool = False


def _matthews(right: Any, predictions: Any) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(right, predictions))


def _f1(right: Any, predictions: Any) -> float:
    from sklearn.metrics import f1_score

    classes = np.union1d(right, predictions)
    if classes.max() < 2:
        return float(f1_score(right, predictions, zero_division=0.0))
    return float(f1_score(right, predictions, labels=classes, average="macro", zero_division=0.0))


def _correlation(measure: Callable[[Any, Any], Any]) -> Callable[[Any, Any], float]:
    """A function of scipy that returns a correlation as its `statistic`, as a metric."""

    def correlation(right: Any, predictions: Any) -> float:
        constant = any(np.ptp(array) == 0 for array in (right, predictions))
        return 0.0 if constant else float(measure(right, predictions).statistic)

    return correlation


METRICS: Mapping[str, LabelMetric] = {
    "matthews": LabelMetric(MATTHEWS, _matthews),
    "f1": LabelMetric(F1, _f1),
    "pearson": LabelMetric(PEARSON, _correlation(stats.pearsonr), scores=True),
    "spearman": LabelMetric(SPEARMAN, _correlation(stats.spearmanr), scores=True),
}
"""The metrics of classes, besides accuracy, and of scores, by the names that `--metric` takes.

F1 is that of class 1 if there are two classes, and otherwise the mean over the classes. A correlation with a constant
counts as 0.
"""


def measure_labels(model: nn.Module, examples: Examples, metric: str | None = None, *, batch: int = 32) -> list[Result]:
    """Measure a model that predicts one class or one score for each example by `metric`, one of `METRICS`.

    For scores the default is the Pearson correlation, and the other metrics of scores follow. The standard errors come
    from a bootstrap over the examples with a fixed seed. Raises `PermpruneError` if the metric does not fit the labels.
    """
    labels = examples["labels"]
    scores = labels.is_floating_point()
    fitting = {name: one for name, one in METRICS.items() if one.scores == scores}
    if metric is None:
        metric = next(iter(fitting))
    if labels.dim() != 1:
        raise PermpruneError(f'the metric "{metric}" is one of labels, one for each example: leave it out')
    if metric not in fitting:
        kind = "one score for each example" if scores else "classes"
        offered = ", ".join(fitting if scores else ["accuracy", *fitting])
        raise PermpruneError(f'the metric "{metric}" does not fit {kind}: choose one of {offered}')
    counted = examples[labels.ne(IGNORED).nonzero()[:, 0]]
    right, predictions = _predict(model, counted, scores, batch)
    if scores:
        return correlations("regression", right, predictions, first=metric)
    return [bootstrapped("classification", METRICS[metric], right.numpy(), predictions.numpy())]


def correlations(task: str, scores: Tensor, predictions: Tensor, *, first: str) -> list[Result]:
    """Measure the correlations of predictions with scores, both fp64 (count,); the metric `first` comes first."""
    names = sorted((name for name, one in METRICS.items() if one.scores), key=lambda name: name != first)
    return [bootstrapped(task, METRICS[name], scores.numpy(), predictions.numpy()) for name in names]


@torch.inference_mode()
def _predict(model: nn.Module, examples: Examples, scores: bool, batch: int) -> tuple[Tensor, Tensor]:
    """Return the target classes or scores, and the predicted ones: both fp64 (count,)."""
    device = compute_device(model)
    right, predictions = examples["labels"].cpu().double(), torch.zeros(len(examples), dtype=torch.float64)
    with frozen(model):
        for places in track(distributed.share(by_length(examples, batch)), "evaluating"):
            outputs: Any = (scored if scores else labelled)(model, examples[places].trimmed().to(device))
            predicted = outputs.logits.argmax(-1) if isinstance(outputs, Predictions) else outputs.values[:, 0]
            predictions[places] = predicted.double().cpu()
    distributed.add_([predictions])
    return right, predictions


def bootstrapped(task: str, metric: LabelMetric, right: Any, predictions: Any) -> Result:
    """Return the metric of numpy arrays (count,); the resamples of its standard error depend on the count alone."""
    error = drawn = None
    if len(right) > 1:  # something to resample
        draws = stats.bootstrap(
            (right, predictions),
            metric.measure,
            paired=True,
            vectorized=False,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=0,
        )
        error, drawn = float(draws.standard_error), draws.bootstrap_distribution
    value = metric.measure(right, predictions)
    return Result(task, metric.metric, value, count=len(right), stderr=error, draws=drawn)
