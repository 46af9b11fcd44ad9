"""The pruned network: a model with masked layers, its loss and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from permprune.calibration.fisher import output_fisher
from permprune.calibration.statistics import Statistics
from permprune.errors import PermpruneError
from permprune.examples import Examples, batches
from permprune.losses.objective import Loss, TeacherOutputs
from permprune.losses.targets import Task
from permprune.models.autocast import autocast
from permprune.models.forward import frozen, padding_of
from permprune.models.layers import Layer
from permprune.models.modality import LIGHT
from permprune.models.narrow_weights import NarrowWeights
from permprune.pattern import Pattern
from permprune.pruning.gradients import Gradients, GradientSums, differentiable, received
from permprune.pruning.masked import MaskedLayers
from permprune.pruning.problem import Orders, Outline, Part
from permprune.saliency.metrics import Saliency
from permprune.system import distributed, sharding
from permprune.system.device import compute_device
from permprune.system.shelf import Computed, Shelf

COUPLED = 4096
"""The largest number of rows of a layer for which the covariance of rows is computed: 64 MiB in fp32."""

SMALL = 1e-6
"""Lower bound for the Fisher information of rows with a covariance, as a share of the mean: less is rounding error."""


class PrunedNetwork(MaskedLayers):
    """A model with masked layers, with methods for its loss and gradients.

    `task` computes the model's predictions for a batch, together with their targets. Examples run in batches of `batch`
    (`LIGHT` times as many without gradients) on the model's device, with activations of type `dtype`. `recompute` turns
    on activation checkpointing, which saves memory and takes more time (`recomputed`).
    """

    def __init__(
        self,
        model: nn.Module,
        outline: Outline,
        *,
        statistics: Statistics,
        saliency: Saliency,
        patterns: Mapping[str, Pattern],
        task: Task,
        dtype: torch.dtype,
        batch: int,
        recompute: bool,
        held: NarrowWeights,
        shelf: Shelf | None = None,
    ) -> None:
        super().__init__(outline, statistics=statistics, saliency=saliency, patterns=patterns, held=held, shelf=shelf)
        self.model, self.task, self.dtype, self.batch, self.recompute = model, task, dtype, batch, recompute
        self.saliency = saliency

    def restricted(self, outline: Outline, patterns: Mapping[str, Pattern]) -> PrunedNetwork:
        """Return the network of only the layers of an outline, in natural order, with these patterns.

        The model runs with it, and with its own weights in other layers; this network is detached.
        """
        self.detach()
        return PrunedNetwork(
            self.model,
            outline,
            statistics=self.statistics,
            saliency=self.saliency,
            patterns=patterns,
            task=self.task,
            dtype=self.dtype,
            batch=self.batch,
            recompute=self.recompute,
            held=self.held,
            shelf=self.shelf,
        )

    @property
    def device(self) -> torch.device:
        """The device on which the model runs."""
        return compute_device(self.model)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the layers, by name."""
        return {name: layers[0].stored for name, layers in self.by_parameter.items()}

    def autocast(self) -> AbstractContextManager[None]:
        """A context in which activations have the network's dtype."""
        return autocast(self.device, self.dtype)

    @torch.no_grad()
    def compute_teacher_outputs(
        self, examples: Examples, loss: Loss, batch: int | None = None
    ) -> list[TeacherOutputs] | None:
        """Return the dense model's outputs for this rank's batches of examples; None if the loss needs none.

        By default the batches are those of `loss`.
        """
        if not loss.needs_teacher(self.task):
            return None
        outputs = []
        with frozen(self.model), self.dense_weights():
            for shown in _share(examples, batch or LIGHT * self.batch):
                with self.autocast():
                    outputs.append(loss.compute_teacher_outputs(self.model, shown.to(self.device), self.task))
        return outputs

    @torch.inference_mode()
    def loss(self, examples: Examples, loss: Loss, teacher_outputs: Sequence[TeacherOutputs] | None = None) -> float:
        """Return the mean loss over `examples` with the current weights, over all ranks.

        `teacher_outputs` are those of `compute_teacher_outputs` for the same examples and loss; if they are needed and
        not given, they are computed.
        """
        total, count, batch = 0.0, 0.0, LIGHT * self.batch
        again = len(examples) > batch * distributed.world() and self.shelf.place == "device"
        with frozen(self.model), self.packed_once() if again else nullcontext():
            for shown, dense in self._batches(examples, loss, batch, teacher_outputs):
                with self.autocast():
                    value, terms = loss(self.model, shown, self.task, dense)
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
        fisher = {name: self._no_fisher(layer) for name, layer in self.layers.items()}
        alike, layers = self.statistics.one_label_per_example, list(self.layers.values())
        earlier = mean.stored if mean and distributed.adds_once() else self.shelf.another()
        for name in earlier:
            earlier[name] *= cast(Gradients, mean).count
        sums = GradientSums(self.parameters, self.dtype, earlier, seed=int(examples.digest[:8], 16))
        total, count = 0.0, 0.0
        with differentiable(self.model, self.parameters, self.recompute), received(self.parameters, sums.add):
            for shown, dense in self._batches(examples, loss, self.batch):
                padding = padding_of(self.model, shown)
                with output_fisher(layers, fisher, one_label_per_example=alike, padding=padding):
                    value, terms = self._backward(shown, loss, dense)
                total, count = total + value, count + terms
        total, count = distributed.total(total, count)
        distributed.add_(list(fisher.values()))
        terms = int(count) + (mean.count if mean else 0)
        stored = sums.mean(terms, ran=bool(_share(examples, self.batch)))
        fisher = {name: f * loss.curvature / count for name, f in fisher.items()}
        if mean:
            known = mean.fisher | mean.covariance
            fisher = {name: known[name].lerp(f, count / terms) for name, f in fisher.items()}
        covariance = {name: f for name, f in fisher.items() if f.dim() == 2}
        fisher |= {name: f.diagonal().clamp_min(SMALL * float(f.diagonal().mean())) for name, f in covariance.items()}
        weight = Computed(self.layers, lambda name: self.layers[name].part_of(stored[self.layers[name].parameter]))
        return Gradients(weight, fisher, total / count, terms, covariance, stored)

    def slopes(self, examples: Examples, loss: Loss, before: Orders, after: Orders) -> dict[str, float]:
        """Return the slope of the mean loss over `examples` at the current weights, by problem, over all ranks.

        The slope is along the step between two sets of orders (see `slopes_along`). The gradient of a weight is freed
        as soon as its contribution to the slope is known.
        """
        parts: dict[str, list[tuple[str, Part]]] = {}
        for problem in self.problems:
            for part in problem.parts:
                parts.setdefault(part.layer, []).append((problem.name, part))
        sums, count = {problem.name: 0.0 for problem in self.problems}, 0.0

        def add(parameter: str, gradient: Tensor) -> None:
            for layer in self.by_parameter[parameter]:
                for name, part in parts.get(layer.name, []):
                    sums[name] += self.part_slope(part, before[name], after[name], layer.part_of(gradient))

        with differentiable(self.model, self.parameters, self.recompute), received(self.parameters, add):
            for shown, dense in self._batches(examples, loss, self.batch):
                count += self._backward(shown, loss, dense)[1]
        *totals, count = distributed.total(*sharding.total(*sums.values()), count)
        return {name: value / count for name, value in zip(sums, totals, strict=True)}

    def take_gradients(
        self,
        examples: Examples,
        loss: Loss,
        take: Callable[[str, Tensor], None],
        *,
        kept: bool = False,
        layers: Iterable[str] | None = None,
    ) -> float:
        """Call `take` with the name of each layer and its gradient of the mean loss over `examples`, over all ranks.

        Returns the mean loss of this rank's batches. Gradients are as in `gradients`. In one process, a weight's
        gradient is complete, and freed after `take`, in the backward pass of the last batch: of a single batch, the
        gradients of all weights are never in memory together. `take` must not change the weights that the layers of
        this pass have yet to read. With `kept` the gradients of weights that are pruned now may be 0. With `layers`
        only those that share a parameter with these are taken. Raises `PermpruneError` as `gradients` does.
        """
        shares = list(self._batches(examples, loss, self.batch))
        taken = self.layers.values() if layers is None else [self.layers[name] for name in layers]
        parameters = {layer.parameter: layer.stored for layer in taken}
        resting = self.shelf.another(Computed(parameters, self._kept_of) if kept else None)
        sums, alone = GradientSums(parameters, self.dtype, resting), distributed.world() == 1
        count, losses = distributed.total(len(shares))[0], list[float]()

        def hand(parameter: str, gradient: Tensor) -> None:
            for layer in self.by_parameter[parameter]:
                take(layer.name, layer.part_of(gradient))

        def complete(parameter: str, gradient: Tensor) -> None:
            if parameter in sums.sums:
                gradient.add_(sums.sums.pop(parameter))
            hand(parameter, gradient)

        with differentiable(self.model, parameters, self.recompute):
            for number, (shown, dense) in enumerate(shares, 1):
                with received(parameters, complete if alone and number == len(shares) else sums.add):
                    value, terms = self._backward(shown, loss, dense, count)
                losses.append(value / max(1, terms))
            if not alone:
                gradients = sums.mean(1, ran=bool(shares))
                for name, parameter in parameters.items():
                    hand(name, gradients.pop(name).to(parameter.dtype))
        return sum(losses) / max(1, len(losses))

    def _kept_of(self, parameter: str) -> Tensor:
        """Which elements of a parameter the masks of its layers keep, bool."""
        mask = torch.zeros_like(self.parameters[parameter], dtype=torch.bool)
        for layer in self.by_parameter[parameter]:
            layer.part_of(mask).copy_(self.masks[layer.name])
        return mask

    def _backward(
        self, shown: Examples, loss: Loss, teacher_outputs: TeacherOutputs | None, count: float | None = None
    ) -> tuple[float, float]:
        """Run a batch forward and backward; returns the summed loss and the number of terms.

        The gradient is that of the sum or, if the `count` of all batches is given, of the mean over them.
        """
        with self.autocast():
            value, terms = loss(self.model, shown, self.task, teacher_outputs)
        if not value.requires_grad:
            raise PermpruneError(f"{loss} has no gradient: compute it from the model's outputs")
        (value if count is None else value / (max(1, terms) * count)).backward()  # a batch may have no labels
        return float(value.detach()), terms

    def _no_fisher(self, layer: Layer) -> Tensor:
        """Zeros for the Fisher information of a layer's rows, (rows,), or for the covariance of rows, (rows, rows)."""
        rows, dtype = layer.shape[0], torch.promote_types(layer.stored.dtype, torch.float32)
        square = self.statistics.one_label_per_example and rows <= COUPLED and distributed.shards() == 1
        return layer.stored.new_zeros((rows, rows) if square else rows, dtype=dtype)

    def _batches(
        self,
        examples: Examples,
        loss: Loss,
        size: int,
        teacher_outputs: Sequence[TeacherOutputs] | None = None,
    ) -> Iterator[tuple[Examples, TeacherOutputs | None]]:
        """Iterate over this rank's batches, on the model's device, with the dense model's outputs or None.

        These are computed if they are not given.
        """
        share, given = _share(examples, size), teacher_outputs or self.compute_teacher_outputs(examples, loss, size)
        outputs: Sequence[TeacherOutputs | None] = given or [None] * len(share)
        return ((shown.to(self.device), dense) for shown, dense in zip(share, outputs, strict=True))


def _share(examples: Examples, batch: int) -> Sequence[Examples]:
    """The batches of this rank."""
    return distributed.share(batches(examples, batch))
