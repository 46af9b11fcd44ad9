"""Check a channel space numerically: a random permutation must leave the model's outputs unchanged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from permprune.checkpoints.probe import largest_difference
from permprune.coupling.fold import fold, inverse
from permprune.coupling.space import ChannelSpace
from permprune.errors import PermpruneError
from permprune.models.forward import forward_arguments, inference, main_outputs


def verify_space(
    model: nn.Module,
    space: ChannelSpace,
    example: Mapping[str, Tensor],
    tolerance: float = 1e-4,
    seed: int = 0,
) -> float:
    """Fold a random permutation, compare the outputs on the example batch, and fold the inverse to restore the model.

    Returns the largest absolute difference over all outputs, computed in the model's own precision. Raises
    `PermpruneError` if the difference exceeds max(`tolerance`, 8 * machine epsilon) times the largest absolute output
    (a changed order of summation changes the rounding, which matters in half precision), or if the space is frozen.
    Outputs that are not floating point must be equal.
    """
    table = _random_table(space, seed)
    before = _outputs(model, example)
    fold(model, space, table)
    try:
        after = _outputs(model, example)
    finally:
        fold(model, space, inverse(table))
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        difference, scale = largest_difference(old, new)
        bound = max(tolerance, 8 * torch.finfo(old.dtype).eps) * scale if old.is_floating_point() else 0.0
        if not difference <= bound:
            raise PermpruneError(
                f"permuting {space.name} changes the model's output by {difference:.3g} (of {scale:.3g}): "
                "this is a bug in the coupling analysis: exclude the space, and report the model"
            )
        worst = max(worst, difference)
    return worst


def _random_table(space: ChannelSpace, seed: int) -> Tensor:
    """A random permutation for each block, never the identity, which would verify nothing."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.stack([torch.randperm(space.size, generator=generator) for _ in range(space.blocks)])
    identity = (table == torch.arange(space.size)).all(dim=1, keepdim=True)
    return torch.where(identity, table.roll(1, dims=1), table)


def _outputs(model: nn.Module, example: Mapping[str, Tensor]) -> list[Tensor]:
    with inference(model):
        output = model(**forward_arguments(model, example))
    return [leaf.clone() for leaf in main_outputs(output) if isinstance(leaf, Tensor)]
