"""How far rounding moves the outputs of a packed model, and whether that explains how far they are from the masked one.

Rounding errors are taken as noise that is uniform within a step (Widrow and Kollar, Quantization Noise, 2008).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from permprune.checkpoints.probe import Probe, largest_difference
from permprune.errors import PermpruneError
from permprune.kernels.product.int8 import Int8Embedding, Int8Table, TiedHead
from permprune.kernels.product.layout import BLOCK
from permprune.kernels.product.module import PackedLinear
from permprune.models.hooks import attached

MARGIN = 4.0
"""The accepted difference relative to the change by noise. Of nine packed models the ratio was from 0.5 to 1.9."""


DRAWS, LEAST_OUTPUTS = 8, 64
"""Most draws of the noise, and the outputs that all of them are to change: the two logits of a classifier may happen to
move by a twentieth of what others do."""


def rounding_change(model: PreTrainedModel, probe: Probe) -> float:
    """Return the largest absolute change of a packed model's outputs on a probe by noise like rounding errors.

    The noise is added to all values of layers and tables that are stored rounded, and to the outputs of all modules in
    16 bits; with few outputs several times. The seed is fixed.
    """
    generator = torch.Generator().manual_seed(0)
    modules = [module for module in model.modules() if not any(module.children())]
    before = probe.outputs_of(model)
    draws = min(DRAWS, -(-LEAST_OUTPUTS // max(1, before.numel())))
    with attached(module.register_forward_hook(partial(_noisy, generator)) for module in modules):
        return max(largest_difference(before, probe.outputs_of(model))[0] for _ in range(draws))


def check_rounding(model: PreTrainedModel, probe: Probe, difference: float, *, before: float, what: str) -> float:
    """Return `rounding_change`, if it explains the difference of a packed model's outputs from those of a probe.

    `before` is the tolerance of the probe before the model was packed. Raises `PermpruneError` if it does not; `what`
    names the model in the message.
    """
    rounding = rounding_change(model, probe)
    if not difference <= before + MARGIN * rounding:
        raise PermpruneError(
            f"{what} computes other outputs than the masked model did (they differ by {difference:.2g}, where rounding "
            f"to its types changes them by about {rounding:.2g}): pack the folder that it was made from again"
        )
    return rounding


def _noisy(generator: torch.Generator, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
    """Add the noise to what a module returned, as a forward hook."""
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        return outputs
    table = module.embedding if isinstance(module, TiedHead) else module
    if isinstance(table, PackedLinear):
        noise = _noise(table.packed.unpack(), table.packed.scale, table.layout.dtype, generator, table.layout.part)
        inputs = args[0] if table.order is None else args[0][..., table.order]
        outputs = outputs + F.linear(inputs.float(), noise).to(outputs.dtype)
    elif isinstance(table, Int8Table):
        noise = _noise(table.weight, table.scale, torch.int8, generator)
        reads = F.embedding(args[0], noise) if module is table and isinstance(table, Int8Embedding) else None
        outputs = outputs + (F.linear(args[0].float(), noise) if reads is None else reads).to(outputs.dtype)
    return outputs + _noise(outputs, None, outputs.dtype, generator) if outputs.dtype.itemsize < 4 else outputs


def _noise(
    numbers: Tensor, scale: Tensor | None, dtype: torch.dtype, generator: torch.Generator, part: int = BLOCK
) -> Tensor:
    """Return noise within half a step up or down for numbers that are stored as `dtype`; zeros stay.

    Integers have a `scale` (rows, parts of a row) for each `part` channels; a step of other types is relative to the
    number.
    """
    noise = torch.rand(numbers.shape, generator=generator).sub_(0.5).to(numbers.device)
    if scale is None:
        return (noise * numbers * torch.finfo(dtype).eps).to(numbers.dtype)
    steps = scale.float().repeat_interleave(part, -1)[:, : numbers.shape[1]]
    return noise * steps * (numbers != 0)
