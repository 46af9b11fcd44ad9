"""Values of int4 that are solved: each layer's outputs on calibration examples stay as near as they can.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds one column after the other and changes the columns after it, so that
they compensate for its error. Here only kept weights change: the mask stays. Coordinate descent (Nair & Suggala 2024,
arXiv 2406.17542) then moves each value to the best step beside all others, which halves the error again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from permprune.calibration.moments import inverse_factor, moments_of
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.kernels.product.int4 import round_to_int4, search_scale
from permprune.kernels.product.layout import BLOCK
from permprune.models.block_by_block import block_by_block
from permprune.models.experts import Routed
from permprune.models.forward import inference, padding_of, run_model
from permprune.models.hooks import hooked
from permprune.models.layers import Layer
from permprune.system.device import compute_device

DAMPING = 0.01
"""What is added to the diagonal of the second moments, in units of its mean."""

SWEEPS = 3
"""Passes of coordinate descent over all columns; more gain little."""


@torch.no_grad()
def solve(model: nn.Module, layers: Mapping[str, Layer], examples: Examples) -> dict[str, Tensor]:
    """Make the weights of layers steps of int4, in place, and return their scales by layer, bf16 (rows, blocks).

    Blocks of the model are solved one after the other, each for what it reads of those before it, in one forward pass
    with all examples in one batch. Layers that the pass does not reach, and those outside of the blocks, stay as they
    are. Raises `PermpruneError` if the second moments of a layer's inputs cannot be used.
    """
    shown, scales = examples.to(compute_device(model)), dict[str, Tensor]()
    padding = padding_of(model, shown)

    def visit(own: list[Layer], run_block: Callable[[], Any]) -> None:
        read: list[tuple[Tensor, list[Layer]]] = []  # layers that read the same tensor share its moments

        def see(layer: Layer, x: Tensor, _routed: Routed | None) -> None:
            for seen, readers in read:
                if seen is x:
                    readers.append(layer)
                    return
            read.append((x, [layer]))

        with hooked(own, before=see):
            run_block()
        for x, readers in read:
            name = readers[0].name
            moments = moments_of(padding.real(x, None, readers[0].owner), name, half=False)[name]
            for layer in readers:
                try:
                    solved, scales[layer.name] = solve_layer(layer.weight.float(), moments)
                except PermpruneError as error:
                    raise PermpruneError(f"{layer.name}: {error}") from error
                layer.weight.copy_(solved)

    with block_by_block(model, layers.values(), visit, "solving int4"), inference(model):
        run_model(model, shown)
    return scales


def solve_layer(
    weight: Float[Tensor, "rows channels"], moments: Float[Tensor, "channels channels"]
) -> tuple[Float[Tensor, "rows channels"], Float[Tensor, "rows blocks"]]:
    """Return the values of a pruned weight in int4, and their scales in bf16.

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
    for _ in range(SWEEPS):
        for block, scale in zip(_blocks(len(columns)), scales, strict=True):
            changes = _descend(columns[block], kept[block], gradient[block].clone(), damped[block, block], scale)
            gradient.addmm_(damped[:, block], changes)
    return columns.T.contiguous(), torch.stack(scales, 1)


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


def _descend(columns: Tensor, kept: Tensor, gradient: Tensor, moments: Tensor, scale: Tensor) -> Tensor:
    """Move each column of a block, (k, rows), in place to its best steps while the others stay; return the changes.

    `gradient`, (k, rows), is updated as well, and `moments` are those of the block.
    """
    changes = torch.zeros_like(columns)
    for i, column in enumerate(columns):
        best = _steps(column - gradient[i] / moments[i, i], scale).mul_(kept[i])
        torch.sub(best, column, out=changes[i])
        column.copy_(best)
        gradient.addr_(moments[i], changes[i])
    return changes
