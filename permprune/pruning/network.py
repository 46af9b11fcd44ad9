"""The pruned network: masked layers inside their model, with the loss and the gradients of the whole model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from permprune.calibration.fisher import output_fisher
from permprune.calibration.statistics import Statistics
from permprune.errors import PermpruneError
from permprune.examples import Examples, batches
from permprune.kernels.adam.rounding import add_rounded_
from permprune.losses.loss import Loss, TeacherOutputs
from permprune.losses.targets import Task
from permprune.models.activation_checkpointing import recomputed
from permprune.models.autocast import autocast
from permprune.models.forward import frozen, padding_of
from permprune.models.layers import Layer
from permprune.models.narrow_weights import NarrowWeights
from permprune.pattern import Pattern
from permprune.pruning.masked import MaskedLayers
from permprune.pruning.problem import Orders, Part, Problem
from permprune.saliency.base import Saliency
from permprune.system import distributed, sharding
from permprune.system.device import compute_device

COUPLED = 4096
"""The largest number of rows of a layer for which the covariance of rows is computed: 64 MiB in fp32."""

LIGHT = 2
"""How many batches of a pass with gradients make one of a pass without, which holds few activations."""

SPREAD = 0x27D4EB2F
"""The difference of the seeds of one sum in bf16 and the next."""

SMALL = 1e-6
"""Lower bound for the Fisher information of rows with a covariance, as a share of the mean: less is rounding error."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of the mean loss over some examples at the current masks, by layer.

    `weight[layer]` is dLoss/dW_eff (rows, channels), of the narrower of two types: that of activations, and that of the
    weight as it is held. `fisher[layer]` (rows,) is the Fisher information as in `Statistics`, averaged over the
    `count` terms of this loss and multiplied by the loss's `curvature`. `loss` is the mean loss. If each example has
    one label, `covariance[layer]` (rows, rows) is the `row_covariance` of layers of at most `COUPLED` rows; its
    diagonal is `fisher`. `stored` are the gradients of the parameters, whose memory those in `weight` share.
    """

    weight: dict[str, Tensor]
    fisher: dict[str, Tensor]
    loss: float
    count: int
    covariance: dict[str, Tensor] = field(default_factory=dict)
    stored: dict[str, Tensor] = field(default_factory=dict)

    def discounted(self, weight: float) -> Gradients:
        """Return these gradients with this share of their weight in later means."""
        return replace(self, count=round(self.count * weight))


class PrunedNetwork(MaskedLayers):
    """A model with masked layers, with methods for its loss and gradients.

    `task` computes the model's predictions for a batch, together with their targets. Examples run in batches of `batch`
    (`LIGHT` times as many without gradients) on the model's device, with activations of type `dtype`. `recompute` turns
    on activation checkpointing, which saves memory and takes more time (`recomputed`).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        problems: list[Problem],
        sites: dict[str, str],
        *,
        statistics: Statistics,
        saliency: Saliency,
        patterns: Mapping[str, Pattern],
        task: Task,
        dtype: torch.dtype = torch.float32,
        batch: int = 2,
        recompute: bool = False,
        held: NarrowWeights | None = None,
    ) -> None:
        super().__init__(
            layers, problems, sites, statistics=statistics, saliency=saliency, patterns=patterns, held=held
        )
        self.model, self.task, self.dtype, self.batch, self.recompute = model, task, dtype, batch, recompute

    @property
    def device(self) -> torch.device:
        """The device on which the model runs."""
        return compute_device(self.model)

    def autocast(self) -> AbstractContextManager[None]:
        """A context in which activations have the network's dtype."""
        return autocast(self.device, self.dtype)

    @torch.inference_mode()
    def loss(self, examples: Examples, loss: Loss, teacher_outputs: Sequence[TeacherOutputs] | None = None) -> float:
        """Return the mean loss over `examples` with the current weights, over all ranks.

        `teacher_outputs` are those of `compute_teacher_outputs` for the same examples and loss; if they are needed and
        not given, they are computed.
        """
        total, count = 0.0, 0.0
        with frozen(self.model):
            known = teacher_outputs or self.compute_teacher_outputs(examples, loss)
            for part, dense in self._parts(examples, known, LIGHT * self.batch):
                with self.autocast():
                    value, terms = loss(self.model, part, self.task, dense)
                total, count = total + float(value), count + terms
        total, count = distributed.total(total, count)
        return total / count

    def gradients(self, examples: Examples, loss: Loss, mean: Gradients | None = None) -> Gradients:
        """Return the gradients of the mean loss over `examples` with respect to the current weights, over all ranks.

        With `mean`, earlier gradients, the result is the average of both, weighted by the numbers of terms; only the
        `loss` is that of `examples` alone. The tensors of `mean` are overwritten, so that only one gradient of each
        weight is in memory. Sums in bf16 are rounded stochastically: the longer a mean, the smaller are the changes by
        later examples, which rounding to the nearest would lose. Raises `PermpruneError` if the loss has no gradient,
        or if a layer takes no part in it.
        """
        fisher = {name: self._no_fisher(layer.weight) for name, layer in self.layers.items()}
        sums = {}
        if mean and distributed.adds_once():
            sums = {name: gradient.mul_(mean.count) for name, gradient in mean.stored.items()}
        total, count, seed = 0.0, 0.0, int(examples.digest[:8], 16)
        with self._differentiable(), self._summed(sums, seed):
            for part, dense in self._differentiated(examples, loss):
                with self._output_fisher(fisher, part):
                    value, terms = self._backward(part, loss, dense)
                total, count = total + value, count + terms
        total, count = distributed.total(total, count)
        distributed.add_(list(fisher.values()))
        terms = int(count) + (mean.count if mean else 0)
        stored = self._collect(sums, terms, bool(_share(examples, self.batch)), seed)
        fisher = {name: f * loss.curvature / count for name, f in fisher.items()}
        if mean:
            fisher = {
                name: mean.covariance.get(name, mean.fisher[name]).lerp(own, count / terms)
                for name, own in fisher.items()
            }
        covariance = {name: f for name, f in fisher.items() if f.dim() == 2}
        fisher |= {name: f.diagonal().clamp_min(SMALL * float(f.diagonal().mean())) for name, f in covariance.items()}
        weight = {name: layer.part_of(stored[layer.parameter]) for name, layer in self.layers.items()}
        return Gradients(weight, fisher, total / count, terms, covariance, stored)

    def slopes(self, examples: Examples, loss: Loss, before: Orders, after: Orders) -> dict[str, float]:
        """Return the slope of the mean loss over `examples` at the current weights, by problem, over all ranks.

        The slope is along the step between two sets of orders, as `slope` computes it from gradients. The gradient of a
        weight is freed as soon as its contribution to the slope is known.
        """
        parts: dict[str, list[tuple[Problem, Part]]] = {}
        for problem in self.problems:
            for part in problem.parts:
                parts.setdefault(part.layer, []).append((problem, part))
        sums, count = {problem.name: 0.0 for problem in self.problems}, 0.0

        def take(name: str, gradient: Tensor) -> None:
            for problem, part in parts.get(name, []):
                sums[problem.name] += self.part_slope(part, before[problem.name], after[problem.name], gradient)

        with self._differentiable(), self._taken(take):
            for shown, dense in self._differentiated(examples, loss):
                count += self._backward(shown, loss, dense)[1]
        *totals, count = distributed.total(*sharding.total(*sums.values()), count)
        return {name: value / count for name, value in zip(sums, totals, strict=True)}

    def take_gradients(self, examples: Examples, loss: Loss, take: Callable[[str, Tensor], None]) -> float:
        """Call `take` with the name of each layer and its gradient of the mean loss over `examples`, over all ranks.

        Returns the mean loss of this rank's batches. Gradients are as in `gradients`. In one process, a weight's
        gradient is complete, and freed after `take`, in the backward pass of the last batch: of a single batch, the
        gradients of all weights are never in memory together. `take` must not change the weights that the layers of
        this pass have yet to read. Raises `PermpruneError` as `gradients` does.
        """
        parts, together = list(self._differentiated(examples, loss)), distributed.world() > 1
        sums: dict[str, Tensor] = {}
        count, losses = distributed.total(len(parts))[0], list[float]()
        with self._differentiable():
            for number, (part, dense) in enumerate(parts, 1):
                last = number == len(parts) and not together
                with self._taken(take, sums) if last else self._summed(sums):
                    value, terms = self._backward(part, loss, dense, count)
                losses.append(value / terms)
            if together:
                gradients = self._collect(sums, 1, bool(parts))
                for name, weight in self._parameters().items():
                    self._hand(name, gradients.pop(name).to(weight.dtype), take)
        return sum(losses) / max(1, len(losses))

    def _taken(
        self, take: Callable[[str, Tensor], None], sums: dict[str, Tensor] | None = None
    ) -> AbstractContextManager[None]:
        """A context in which each weight's gradient, plus that in `sums`, goes to `take`, by layer, and is freed."""
        sums = {} if sums is None else sums

        def hand(name: str, gradient: Tensor) -> None:
            self._hand(name, gradient.add_(sums.pop(name)) if name in sums else gradient, take)

        return self._received(hand)

    def _summed(self, sums: dict[str, Tensor], seed: int | None = None) -> AbstractContextManager[None]:
        """A context in which each weight's gradient is added to `sums`, by parameter, and freed.

        With a `seed` sums in bf16 are rounded stochastically.
        """
        number = itertools.count(1)

        def add(name: str, gradient: Tensor) -> None:
            if name not in sums:
                sums[name] = gradient.to(self._gradient_type(gradient)).contiguous()
            elif seed is not None and sums[name].dtype == torch.bfloat16:
                add_rounded_(sums[name], gradient, (seed + next(number) * SPREAD) % 2**32)
            else:
                sums[name] += gradient

        return self._received(add)

    @contextmanager
    def _received(self, receive: Callable[[str, Tensor], None]) -> Iterator[None]:
        """A context in which `receive` gets the gradient of each weight, by parameter, from a batch's backward pass.

        It comes as soon as it is known, and the parameter does not keep it.
        """

        def hand(name: str, weight: Tensor) -> None:
            gradient, weight.grad = cast(Tensor, weight.grad), None
            receive(name, gradient)

        with ExitStack() as hooks:
            for name, weight in self._parameters().items():
                hooks.callback(weight.register_post_accumulate_grad_hook(partial(hand, name)).remove)
            yield

    def _hand(self, parameter: str, gradient: Tensor, take: Callable[[str, Tensor], None]) -> None:
        """Call `take` with each layer of a parameter and its part of the parameter's gradient."""
        for layer in self.layers.values():
            if layer.parameter == parameter:
                take(layer.name, layer.part_of(gradient))

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        """A context in which backward passes give the weights of the layers gradients, and no other parameter."""
        weights = self._parameters().values()
        with frozen(self.model), recomputed(self.model, self.recompute):
            for weight in weights:
                weight.requires_grad_(True)
            try:
                yield
            finally:
                for weight in weights:
                    weight.requires_grad_(False)

    def _backward(
        self, part: Examples, loss: Loss, teacher_outputs: TeacherOutputs | None, count: float | None = None
    ) -> tuple[float, float]:
        """Run a batch forward and backward; returns the summed loss and the number of terms.

        The gradient is that of the sum or, if the `count` of all batches is given, of the mean over them.
        """
        with self.autocast():
            value, terms = loss(self.model, part, self.task, teacher_outputs)
        if not value.requires_grad:
            raise PermpruneError(f"{loss} has no gradient: compute it from the model's outputs")
        (value if count is None else value / (terms * count)).backward()
        return float(value.detach()), terms

    def _output_fisher(self, fisher: dict[str, Tensor], part: Examples) -> AbstractContextManager[None]:
        """A context in which the backward pass of a batch adds the rows' Fisher information to `fisher`."""
        alike, layers = self.statistics.one_label_per_example, list(self.layers.values())
        return output_fisher(layers, fisher, one_label_per_example=alike, padding=padding_of(self.model, part))

    def _no_fisher(self, weight: Tensor) -> Tensor:
        """Zeros for the Fisher information of a weight's rows, (rows,), or for the covariance of rows, (rows, rows)."""
        rows, dtype = len(weight), torch.promote_types(weight.dtype, torch.float32)
        square = self.statistics.one_label_per_example and rows <= COUPLED and distributed.shards() == 1
        return weight.new_zeros((rows, rows) if square else rows, dtype=dtype)

    def _collect(self, sums: dict[str, Tensor], terms: int, asked: bool, seed: int | None = None) -> dict[str, Tensor]:
        """Add the sums of gradients of all ranks, and divide them by `terms`, in place; returns them by parameter.

        `asked` is whether this rank ran any examples; if so, raises `PermpruneError` for a weight without a gradient.
        With a `seed`, which is the same on all ranks, sums in bf16 are rounded stochastically.
        """
        for number, (name, weight) in enumerate(self._parameters().items()):
            if name not in sums and asked:
                raise PermpruneError(
                    f"{name.removesuffix('.weight')} has no effect on the loss: "
                    "exclude it, or calibrate with inputs that use it"
                )
            if name not in sums:
                sums[name] = torch.zeros_like(weight, dtype=self._gradient_type(weight))
            own = sums[name]
            if seed is not None and own.dtype == torch.bfloat16 and distributed.world() > distributed.shards():
                whole = own.float()
                distributed.add_([whole])
                add_rounded_(own.zero_(), whole, (seed - number * SPREAD) % 2**32)
            else:
                distributed.add_([own])
            own /= terms
        return sums

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the layers, by name."""
        return {layer.parameter: layer.stored for layer in self.layers.values()}

    def _gradient_type(self, weight: Tensor) -> torch.dtype:
        """The type in which gradients of a weight are kept: the narrower of its own and that of activations."""
        return self.dtype if self.dtype.itemsize < weight.dtype.itemsize else weight.dtype

    def compute_teacher_outputs(self, examples: Examples, loss: Loss) -> list[TeacherOutputs] | None:
        """Return the dense model's outputs for `examples`, in batches as `loss` runs them; None if it needs none."""
        return self._teacher_outputs(examples, loss, LIGHT * self.batch)

    @torch.no_grad()
    def _teacher_outputs(self, examples: Examples, loss: Loss, batch: int) -> list[TeacherOutputs] | None:
        """Return the dense model's outputs for this rank's batches of `batch` examples; None if the loss needs none."""
        if not loss.needs_teacher(self.task):
            return None
        found = []
        with frozen(self.model), self.dense_weights():
            for part in _share(examples, batch):
                with self.autocast():
                    found.append(loss.compute_teacher_outputs(self.model, part.to(self.device), self.task))
        return found

    def _differentiated(self, examples: Examples, loss: Loss) -> Iterator[tuple[Examples, TeacherOutputs | None]]:
        """Iterate over this rank's batches with gradients, as `_parts` does."""
        return self._parts(examples, self._teacher_outputs(examples, loss, self.batch), self.batch)

    def _parts(
        self, examples: Examples, teacher_outputs: Sequence[TeacherOutputs] | None, batch: int
    ) -> Iterator[tuple[Examples, TeacherOutputs | None]]:
        """Iterate over this rank's batches, on the model's device, with their teacher outputs or None."""
        parts = _share(examples, batch)
        known: Sequence[TeacherOutputs | None] = teacher_outputs or [None] * len(parts)
        return ((part.to(self.device), dense) for part, dense in zip(parts, known, strict=True))


def _share(examples: Examples, batch: int) -> Sequence[Examples]:
    """The batches of this rank."""
    return distributed.share(batches(examples, batch))
