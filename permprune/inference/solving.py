"""Values of int4 that are solved on calibration examples, one block of a model after the other (see `solved`).

Each block is then trained through int4, so that its weights make up for what the rounding of others loses: after the
block-wise training of EfficientQAT (Chen et al. 2024, arXiv 2407.11062, section 3.2), with scales and masks that stay.
The gradient of a stored value is taken for that of its weight (the straight-through estimator of Bengio et al. 2013,
arXiv 1308.3432).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from permprune.calibration.moments import moments_of
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.inference.solved import Solved, solve_layer
from permprune.kernels.adam.step import BETAS, rate_at
from permprune.kernels.product.int4 import exact_scale
from permprune.kernels.product.layout import BLOCK, has_positions
from permprune.losses.objective import relative_distance
from permprune.models.autocast import fast
from permprune.models.experts import Routed
from permprune.models.forward import frozen, inference, padding_of, requiring_gradients, run_model
from permprune.models.generation import needs_decoder_inputs, with_decoder_inputs
from permprune.models.hooks import attached, block_by_block, hooked, replaced_while_running
from permprune.models.layers import Layer
from permprune.pattern import Pattern
from permprune.system.device import compute_device
from permprune.system.progress import log

STEPS, PARTS = 60, 24
"""The steps of a block, and the parts of the examples, of which each step takes one."""

RATE = 0.006
"""The highest learning rate, relative to the root mean square of a layer's kept weights."""

COMPARED = 4
"""Every so many parts are compared before and after the training."""

ALIKE = 0.02
"""How far a block's outputs for a part of the examples may be from those for all, relative to these."""

Call = partial[Any]
"""A block's `forward` with the arguments that it was called with for all examples."""


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
    with all examples in one batch. Each is then trained (`BlockTraining`) until it computes what it did before, of
    what blocks before it computed before. Layers that the pass does not reach, and those outside of the blocks, are
    left out. A decoder without inputs reads what the model generates. Raises `PermpruneError` if the second moments of
    a layer's inputs cannot be used.
    """
    if needs_decoder_inputs(model, examples):
        examples = with_decoder_inputs(model, examples)
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


def outputs_of(call: Call) -> Tensor:
    """Run a block; returns its outputs, (examples, ..., channels)."""
    output = call()
    return output if isinstance(output, Tensor) else output[0]  # type: ignore[no-any-return]


def with_tensors(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    """Return the call with `change` of each tensor among its arguments."""
    args, named = _pytree.tree_map_only(Tensor, change, (call.args, call.keywords))
    return partial(call.func, *args, **named)


class BlockTraining:
    """The training of a model's blocks, one after the other, on the `examples` that each is called with at once."""

    def __init__(self, model: nn.Module, examples: Examples) -> None:
        count, size = len(examples), -(-len(examples) // PARTS)
        self._count, self._divides, self._warned = count, True, False
        self._parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        self._paddings = [padding_of(model, examples[part]) for part in self._parts]
        self._last: tuple[Tensor, Tensor] | None = None

    def target(self, call: Call, outputs: Tensor) -> Tensor:
        """Return what a block, which computes these outputs, would compute without the rounding of those before it.

        That is known if the block reads what the last one computes.
        """
        self._divides = self._computes_alone(call, outputs)
        if self._last is None:
            return outputs
        values, exact = self._last

        def is_read(x: Any) -> bool:
            return torch.is_tensor(x) and x.shape == values.shape and torch.equal(x, values)

        if not any(map(is_read, (*call.args, *call.keywords.values()))):
            return outputs
        return outputs_of(with_tensors(call, lambda x: exact if is_read(x) else x))

    def go_on(self, call: Call, target: Tensor) -> None:
        """End with a block, which now runs with its weights of int4, and whose target was this one."""
        self._last = outputs_of(call), target

    def train(
        self, call: Call, target: Tensor, solved: Mapping[Layer, Solved], types: Mapping[Layer, torch.dtype]
    ) -> dict[Layer, Solved]:
        """Train the layers of a block, from solved weights, until its outputs are near `target`; returns their weights.

        `target` is (examples, ..., channels), and `types` are those of what the layers read. The solved weights are
        returned if training does not help, or if the block's outputs for a part of the examples are not a part of its
        outputs, as its arguments do not tell the examples apart; a warning tells so.
        """
        if not (solved and self._divides):
            return dict(solved)
        weights = {layer: one.targets.clone() for layer, one in solved.items()}

        def stored(layer: Layer) -> Tensor:
            return solved[layer].stored(weights[layer])

        def shown(layer: Layer, _parameter: nn.Parameter) -> Tensor:
            return layer.part_of(stored(layer).to(types[layer]))

        calls = [with_tensors(call, partial(self._share, part)) for part in self._parts]
        with running_with({layer: partial(shown, layer) for layer in weights}):
            before = self._mean_error(calls, target)
            self._steps(calls, target, weights)
            if not self._mean_error(calls, target) < before:
                name = next(iter(solved)).name
                log.info("int4: training brings the block of %s no nearer: its values are as solved", name)
                return dict(solved)
        return {layer: replace(solved[layer], values=stored(layer), targets=weights[layer]) for layer in weights}

    def _share(self, part: slice, tensor: Tensor) -> Tensor:
        """A part of an argument, if it has a row for each example."""
        return tensor[part] if tensor.dim() and len(tensor) == self._count else tensor

    def _computes_alone(self, call: Call, outputs: Tensor) -> bool:
        """Whether a block computes the same of the first examples alone as of all, its `outputs`; warns once if not."""
        first = self._parts[0]
        try:
            alone, whole = outputs_of(with_tensors(call, partial(self._share, first))).float(), outputs[first].float()
            divides = whole.shape == alone.shape and bool((whole - alone).norm() <= ALIKE * whole.norm())
        except Exception:  # a model's own code can raise any type
            divides = False
        if not divides and not self._warned:
            self._warned = True
            log.warning("int4: blocks that do not compute examples one by one are solved, and not trained")
        return divides

    def _error(self, number: int, call: Call, target: Tensor) -> Tensor:
        """The distance of a block's outputs for a part of the examples to those wanted, without padding."""
        block, padding = getattr(call.func, "__self__", None), self._paddings[number]
        pair = (padding.real(x, module=block) for x in (outputs_of(call), target[self._parts[number]]))
        return relative_distance([next(pair)], [next(pair)])

    @torch.no_grad()
    def _mean_error(self, calls: list[Call], target: Tensor) -> float:
        """The mean error of some parts."""
        return fmean(float(self._error(number, calls[number], target)) for number in range(0, len(calls), COMPARED))

    def _steps(self, calls: list[Call], target: Tensor, weights: Mapping[Layer, Tensor]) -> None:
        """Change the weights by steps of Adam, in place; those that are 0 stay so."""
        kept = {layer: weight != 0 for layer, weight in weights.items()}
        groups = [
            {"params": [weight], "lr": RATE * float(weight.norm()) / math.sqrt(max(1, int(kept[layer].sum())))}
            for layer, weight in weights.items()
        ]
        adam = torch.optim.Adam(groups, betas=BETAS, foreach=False)
        rates = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: rate_at((step + 0.5) / STEPS))
        generator, parameters = torch.Generator().manual_seed(0), [layer.stored for layer in weights]
        order: list[int] = []
        for _ in range(STEPS):
            order = order or torch.randperm(len(calls), generator=generator).tolist()
            number = order.pop()
            with torch.enable_grad():
                error = self._error(number, calls[number], target)
            if not error.requires_grad:  # the block's own code cuts the graph
                return
            gradients = torch.autograd.grad(error, parameters, allow_unused=True)
            for (layer, weight), gradient in zip(weights.items(), gradients, strict=True):
                weight.grad = None if gradient is None else layer.part_of(gradient).float() * kept[layer]
            adam.step()
            rates.step()


@contextmanager
def running_with(weights: Mapping[Layer, Callable[[nn.Parameter], Tensor]]) -> Iterator[None]:
    """A context in which layers run with other weights, the gradients of which become those of their parameters."""
    replaced = (replaced_while_running(layer.owner, layer.attribute, weight) for layer, weight in weights.items())
    with attached(itertools.chain(*replaced)), requiring_gradients(layer.stored for layer in weights):
        yield
