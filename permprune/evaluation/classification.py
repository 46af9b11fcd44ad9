"""Accuracy of a classifier."""

from __future__ import annotations

import torch
from torch import nn

from permprune.errors import PermpruneError
from permprune.evaluation.result import TOP_1_ACCURACY, TOP_5_ACCURACY, Metric, Result
from permprune.examples import Examples, batches
from permprune.losses.targets import labelled
from permprune.models.forward import frozen
from permprune.system import distributed
from permprune.system.device import compute_device
from permprune.system.progress import track


@torch.inference_mode()
def accuracy(model: nn.Module, examples: Examples, batch: int = 32) -> list[Result]:
    """Measure the top-1 accuracy, and, with more than 5 classes, the top-5 accuracy.

    The labels are classes of the examples or of their positions, each of which then counts as a prediction. Standard
    errors are those of a binomial proportion. Raises `PermpruneError` for labels that the model has no logits for.
    """
    device = compute_device(model)
    first, five, count, classes = 0, 0, 0, 0
    with frozen(model):
        for inputs in track(distributed.share(batches(examples, batch)), "accuracy"):
            predictions = labelled(model, inputs.to(device))
            assert predictions.labels is not None
            classes = predictions.logits.shape[-1]
            right = predictions.logits.topk(min(5, classes)).indices == predictions.labels[:, None]
            first, five, count = first + int(right[:, 0].sum()), five + int(right.sum()), count + predictions.terms
    sums = distributed.total(first, five, count)
    results = [share("classification", TOP_1_ACCURACY, right=sums[0], count=sums[2])]
    if classes > 5:
        results.append(share("classification", TOP_5_ACCURACY, right=sums[1], count=sums[2]))
    return results


def share(task: str, metric: Metric, *, right: float, count: float) -> Result:
    """Return the share of `right` among `count` predictions. Raises `PermpruneError` if `count` is 0."""
    if not count:
        raise PermpruneError("no example has a label: give examples with labels")
    value = right / count
    return Result(task, metric, value, count=int(count), stderr=(value * (1 - value) / count) ** 0.5)
