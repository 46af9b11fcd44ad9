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
    """The share of labels that have the largest logit, and, of more than 5 classes, that are among the largest 5.

    The labels are classes of the examples, or of their positions, which are then what is counted. Standard errors are
    those of a share of so many. Raises `PermpruneError` for labels that the model does not know.
    """
    device = compute_device(model)
    first, five, count, classes = 0, 0, 0, 0
    with frozen(model):
        for part in track(distributed.share(batches(examples, batch)), "accuracy"):
            said = labelled(model, part.to(device))
            assert said.labels is not None
            classes = said.logits.shape[-1]
            right = said.logits.topk(min(5, classes)).indices == said.labels[:, None]
            first, five, count = first + int(right[:, 0].sum()), five + int(right.sum()), count + said.terms
    sums = distributed.total(first, five, count)
    results = [share("classification", TOP_1_ACCURACY, right=sums[0], count=sums[2])]
    if classes > 5:
        results.append(share("classification", TOP_5_ACCURACY, right=sums[1], count=sums[2]))
    return results


def share(task: str, metric: Metric, *, right: float, count: float) -> Result:
    """The share that is right, of `count` predictions. Raises `PermpruneError` where there are none."""
    if not count:
        raise PermpruneError("there is nothing to count: give examples with labels")
    value = right / count
    return Result(task, metric, value, count=int(count), stderr=(value * (1 - value) / count) ** 0.5)
