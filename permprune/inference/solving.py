"""Values of int4 that are solved: each layer's outputs on calibration examples stay as near as they can.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds one column after the other and changes the columns after it, so that
they compensate for its error. Here only kept weights change: the mask stays. Coordinate descent (Nair & Suggala 2024,
arXiv 2406.17542) then moves each value to the best step beside all others, which halves the error again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from permprune.calibration.moments import inverse_factor, moments_of
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.kernels.product.int4 import exact_scale, round_to_int4, search_scale
from permprune.kernels.product.layout import BLOCK
from permprune.models.experts import Routed
from permprune.models.forward import inference, padding_of, run_model
from permprune.models.hooks import block_by_block, hooked
from permprune.models.layers import Layer
from permprune.system.device import compute_device

DAMPING = 0.01
"""What is added to the diagonal of the second moments, in units of its mean."""

SWEEPS = 3
"""Passes of coordinate descent over all columns; more gain little."""


@dataclass(frozen=True)
class Solved:
    """A layer's weights in int4: `values`, fp32 (rows, channels), are steps of `scale`, bf16 (rows, blocks).

    `targets`, fp32 (rows, channels), are what was rounded to them last: the best values beside all others.
    """

    values: Tensor
    scale: Tensor
    targets: Tensor


def solve(model: nn.Module, layers: Mapping[str, Layer], examples: Examples) -> dict[str, Tensor]:
    """Make the weights of layers steps of int4, in place, and return their scales by layer, bf16 (rows, blocks).

    Weights that are steps already stay as they are; the others are solved (`solve_each`).
    """
    scales: dict[str, Tensor] = {}
    for name, layer in layers.items():
        scale, is_exact = exact_scale(
            F.pad(layer.weight.float(), (0, -layer.weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        )
        if is_exact.all():
            scales[name] = scale

    def take(layer: Layer, solved: Solved) -> None:
        layer.weight.copy_(solved.values)
        scales[layer.name] = solved.scale

    if unsolved := {name: layer for name, layer in layers.items() if name not in scales}:
        solve_each(model, unsolved, examples, take)
    return scales


@torch.no_grad()
def solve_each(
    model: nn.Module,
    layers: Mapping[str, Layer],
    examples: Examples,
    take: Callable[[Layer, Solved], None],
    *,
    weight_of: Callable[[Layer], Tensor] = lambda layer: layer.weight,
    columns: Mapping[str, Tensor] | None = None,
) -> None:
    """Call `take` with each layer and its solved weights, which it makes the layer run with.

    Blocks of the model are solved one after the other, each for what it reads of those before it, in one forward pass
    with all examples in one batch. Layers that the pass does not reach, and those outside of the blocks, are left out.
    `weight_of` returns the weight that a layer runs with, and `columns` are its columns, int64 (channels,), in the
    order in which they will be stored, if it is another one. Raises `PermpruneError` if the second moments of a layer's
    inputs cannot be used.
    """
    shown = examples.to(compute_device(model))
    padding = padding_of(model, shown)

    def visit(of_block: list[Layer], run_block: Callable[[], Any]) -> None:
        read: list[tuple[Tensor, list[Layer]]] = []  # layers that read the same tensor share its moments

        def see(layer: Layer, x: Tensor, _routed: Routed | None) -> None:
            for seen, readers in read:
                if seen is x:
                    readers.append(layer)
                    return
            read.append((x, [layer]))

        with hooked(of_block, before=see):
            run_block()
        with torch.autocast(shown.device.type, enabled=False):
            for x, readers in read:
                first = readers[0]
                moments = moments_of(padding.real(x, None, first.owner), first.name)
                for layer in readers:
                    order = None if columns is None else columns[layer.name]
                    try:
                        solved = _in_order(weight_of(layer).float(), moments, order)
                    except PermpruneError as error:
                        raise PermpruneError(f"{layer.name}: {error}") from error
                    take(layer, solved)

    with block_by_block(model, layers.values(), visit, "solving int4"), inference(model):
        run_model(model, shown)


def _in_order(weight: Tensor, moments: Tensor, order: Tensor | None) -> Solved:
    """Solve a layer whose columns will be stored in another order."""
    if order is None:
        return solve_layer(weight, moments)
    solved, back = solve_layer(weight[:, order], moments[order][:, order]), order.argsort()
    return Solved(solved.values[:, back], solved.scale, solved.targets[:, back])


def solve_layer(weight: Float[Tensor, "rows channels"], moments: Float[Tensor, "channels channels"]) -> Solved:
    """Return a pruned weight in int4.

    `weight` is fp32 (rows, channels), and is not changed; its zeros stay. `moments` are the second moments H of its
    inputs. The scale of a block is searched when its first column is reached, on the kept weights as they are then,
    their errors times the diagonal of H. Raises `PermpruneError` if H cannot be used.
    """
    factor = inverse_factor(moments, DAMPING)
    wanted, kept = weight.T.contiguous(), (weight != 0).T.contiguous()
    damped, columns, scales = moments.clone(), wanted.clone(), []
    damped.diagonal().add_(DAMPING * (float(moments.diagonal().mean()) or 1.0))
    for block in _blocks(len(columns)):
        scale = search_scale(columns[block].T.contiguous(), damped.diagonal()[block])
        errors = _round(columns[block], kept[block], factor[block, block], scale)
        columns[block.stop :].addcmul_(factor[block, block.stop :].T @ errors, kept[block.stop :], value=-1)
        scales.append(scale)
    gradient = damped @ (columns - wanted)  # of half the squared error of the outputs
    targets = torch.empty_like(columns)
    for _ in range(SWEEPS):
        for block, scale in zip(_blocks(len(columns)), scales, strict=True):
            before = columns[block].clone()
            _descend(columns[block], targets[block], kept[block], gradient[block].clone(), damped[block, block], scale)
            gradient.addmm_(damped[:, block], columns[block] - before)
    return Solved(columns.T.contiguous(), torch.stack(scales, 1), targets.T.contiguous())


def _blocks(channels: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, channels)) for start in range(0, channels, BLOCK)]


def _steps(column: Tensor, scale: Tensor) -> Tensor:
    """Return the steps nearest to a column, (rows,), of a block with these scales, bf16 (rows,)."""
    return round_to_int4(column.unsqueeze(-1), scale).squeeze(-1) * scale.float()


def _round(columns: Tensor, kept: Tensor, factor: Tensor, scale: Tensor) -> Tensor:
    """Round a block of columns, (k, rows), in place, one after the other.

    Returns their errors, (k, rows), for which the columns after them have to compensate.
    """
    errors = torch.zeros_like(columns)
    for i, column in enumerate(columns):
        rounded = _steps(column, scale)
        torch.div(column - rounded, factor[i, i], out=errors[i])
        column.copy_(rounded)
        columns[i + 1 :].addcmul_(torch.outer(factor[i, i + 1 :], errors[i]), kept[i + 1 :], value=-1)
    return errors


def _descend(columns: Tensor, targets: Tensor, kept: Tensor, gradient: Tensor, moments: Tensor, scale: Tensor) -> None:
    """Move each column of a block, (k, rows), in place to its best steps while the others stay.

    `targets`, (k, rows), become what was rounded; `gradient`, (k, rows), is updated, and `moments` are the block's.
    """
    for i, column in enumerate(columns):
        torch.sub(column, gradient[i], alpha=1 / float(moments[i, i]), out=targets[i]).mul_(kept[i])
        best = _steps(targets[i], scale)
        gradient.addr_(moments[i], best - column)
        column.copy_(best)
