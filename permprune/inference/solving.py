"""Values of int4 that are solved on calibration examples, one block of a model after the other (see `solved`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permprune.calibration.moments import moments_of
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.inference.solved import Solved, solve_layer
from permprune.inference.straight_through import BlockTraining, Call, outputs_of
from permprune.kernels.product.int4 import exact_scale
from permprune.kernels.product.layout import BLOCK, has_positions
from permprune.models.autocast import fast
from permprune.models.experts import Routed
from permprune.models.forward import frozen, inference, padding_of, run_model
from permprune.models.hooks import block_by_block, hooked
from permprune.models.layers import Layer
from permprune.pattern import Pattern
from permprune.system.device import compute_device


def solve(
    model: nn.Module, layers: Mapping[str, Layer], patterns: Mapping[str, Pattern], examples: Examples
) -> dict[str, Tensor]:
    """Make the weights of layers steps of int4, in place, and return their scales by layer, bf16 (rows, parts).

    `patterns` are by layer, too. Weights that are steps already stay as they are; the others are solved (`solve_each`).
    """
    scales: dict[str, Tensor] = {}
    for name, layer in layers.items():
        blocks = F.pad(layer.weight.float(), (0, -layer.weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        if (scale := exact_scale(blocks, paired=has_positions(patterns[name]))) is not None:
            scales[name] = scale.flatten(1)

    def take(layer: Layer, solved: Solved) -> None:
        layer.weight.copy_(solved.values)
        scales[layer.name] = solved.scale

    if unsolved := {name: layer for name, layer in layers.items() if name not in scales}:
        solve_each(model, unsolved, patterns, examples, take)
    return scales


@torch.no_grad()
def solve_each(
    model: nn.Module,
    layers: Mapping[str, Layer],
    patterns: Mapping[str, Pattern],
    examples: Examples,
    take: Callable[[Layer, Solved], None],
) -> None:
    """Call `take` with each layer and its solved weights, which it makes the layer run with.

    Blocks of the model are solved one after the other, each for what it reads of those before it, in one forward pass
    with all examples in one batch. Each is then trained (`straight_through`) until it computes what it did before, of
    what blocks before it computed before. Layers that the pass does not reach, and those outside of the blocks, are
    left out. Raises `PermpruneError` if the second moments of a layer's inputs cannot be used.
    """
    shown = examples.to(compute_device(model))
    padding, training = padding_of(model, shown), BlockTraining(model, shown)

    def visit(of_block: list[Layer], call: Call) -> None:
        read, target = _inputs(of_block, call)
        target = training.target(call, target)
        solved, types = {}, {layer: x.dtype for x, readers in read for layer in readers}
        with torch.autocast(shown.device.type, enabled=False):
            for x, readers in read:
                first = readers[0]
                moments = moments_of(padding.real(x, None, first.owner), first.name)
                for layer in readers:
                    try:
                        paired = has_positions(patterns[layer.name])
                        solved[layer] = solve_layer(layer.weight.float(), moments, paired=paired)
                    except PermpruneError as error:
                        raise PermpruneError(f"{layer.name}: {error}") from error
        read.clear()
        for layer, one in training.train(call, target, solved, types).items():
            take(layer, one)
        training.go_on(call, target)

    # Frozen, because autocast caches the rounded weights of layers that require gradients, which change here.
    with fast(model), block_by_block(model, layers.values(), visit, "solving int4"), inference(model), frozen(model):
        run_model(model, shown)


def _inputs(layers: list[Layer], call: Call) -> tuple[list[tuple[Tensor, list[Layer]]], Tensor]:
    """Return what the layers of a block read, each with its readers, which share its moments; and the outputs."""
    read: list[tuple[Tensor, list[Layer]]] = []

    def see(layer: Layer, x: Tensor, _routed: Routed | None) -> None:
        for seen, readers in read:
            if seen is x:
                readers.append(layer)
                return
        read.append((x, [layer]))

    with hooked(layers, before=see):
        return read, outputs_of(call)
