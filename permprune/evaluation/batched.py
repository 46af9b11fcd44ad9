"""Numbers for each example, from a model that runs on batches which the processes divide among themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from permprune.examples import Examples, by_length
from permprune.models.forward import frozen
from permprune.options import Count, require
from permprune.system import distributed
from permprune.system.device import compute_device
from permprune.system.progress import track


@torch.inference_mode()
def per_example(
    model: nn.Module, examples: Examples, batch: int, measure: Callable[[Examples], Tensor], *, rows: int, what: str
) -> Tensor:
    """Return the numbers that `measure(inputs)` computes for its inputs, (rows, inputs), of all: fp64 (rows, count).

    The inputs are `batch` examples of similar length, on the model's device. `what` names the work in the progress.
    """
    require("batch", batch, Count)
    device, numbers = compute_device(model), torch.zeros(rows, len(examples), dtype=torch.float64)
    with frozen(model):
        for places in track(distributed.share(by_length(examples, batch)), what):
            numbers[:, places] = measure(examples[places].trimmed().to(device)).double().cpu()
    distributed.add_([numbers])
    return numbers
