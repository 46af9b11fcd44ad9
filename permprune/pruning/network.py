"""The pruned network: masked layers inside their model, with the loss and the gradients of the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from permprune.calibration.fisher import output_fisher
from permprune.calibration.statistics import Statistics
from permprune.errors import PermpruneError
from permprune.examples import Examples, batches
from permprune.losses.loss import Loss, TeacherOutputs
from permprune.losses.targets import Task
from permprune.models.activation_checkpointing import recomputed
from permprune.models.forward import frozen, padding_of
from permprune.models.layers import Layer
from permprune.pattern import Pattern
from permprune.pruning.masked import MaskedLayers
from permprune.pruning.problem import Problem
from permprune.saliency.base import Saliency
from permprune.system import distributed
from permprune.system.device import autocast, compute_device

COUPLED = 4096
"""The largest number of rows of a layer for which the covariance of rows is computed: 64 MiB in fp32."""

SMALL = 1e-6
"""Lower bound for the Fisher information of rows with a covariance, as a share of the mean: less is rounding error."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of the mean loss over some examples at the current masks, by layer.

    `weight[layer]` is dLoss/dW_eff (rows, channels), where W_eff is the masked weight. `fisher[layer]` (rows,) is the
    Fisher information as in `Statistics`, averaged over the `count` terms of this loss and multiplied by the loss's
    `curvature`. `loss` is the mean loss. If each example has one label, `covariance[layer]` (rows, rows) is the
    `row_covariance` of layers of at most `COUPLED` rows; its diagonal is `fisher`.
    """

    weight: dict[str, Tensor]
    fisher: dict[str, Tensor]
    loss: float
    count: int
    covariance: dict[str, Tensor] = field(default_factory=dict)

    def averaged(self, mean: Gradients | None) -> Gradients:
        """Average with other gradients at the same masks, weighted by the numbers of terms; `loss` is not averaged."""
        if mean is None:
            return self
        total = mean.count + self.count

        def mix(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: a[name].lerp(b[name], self.count / total) for name in a}

        weight, fisher = mix(mean.weight, self.weight), mix(mean.fisher, self.fisher)
        return Gradients(weight, fisher, self.loss, total, mix(mean.covariance, self.covariance))


def gradient_bytes(weights: int) -> int:
    """Return the bytes of the gradients of this number of weights."""
    return 4 * weights


class PrunedNetwork(MaskedLayers):
    """A model with masked layers, with methods for its loss and gradients.

    `task` computes the model's predictions for a batch, together with their targets. Examples run in batches of `batch`
    on the model's device, with activations of type `dtype`. `recompute` turns on activation checkpointing, which saves
    memory and takes more time (`recomputed`).
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
        batch: int = 4,
        recompute: bool = False,
    ) -> None:
        super().__init__(layers, problems, sites, statistics=statistics, saliency=saliency, patterns=patterns)
        self.model, self.task, self.dtype, self.batch, self.recompute = model, task, dtype, batch, recompute

    @property
    def device(self) -> torch.device:
        """The device on which the model runs."""
        return compute_device(self.model)

    def autocast(self) -> torch.autocast:
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
            for part, dense in self._parts(examples, loss, teacher_outputs):
                with self.autocast():
                    value, terms = loss(self.model, part, self.task, dense)
                total, count = total + float(value), count + terms
        total, count = distributed.total(total, count)
        return total / count

    def gradients(self, examples: Examples, loss: Loss) -> Gradients:
        """Return the gradients of the mean loss over `examples` with respect to the current weights, over all ranks.

        Raises `PermpruneError` if the loss has no gradient, or if a layer takes no part in it.
        """
        weights = {layer.parameter: layer.stored for layer in self.layers.values()}
        fisher = {name: self._no_fisher(layer.weight) for name, layer in self.layers.items()}
        total, count = 0.0, 0.0
        parts = self._parts(examples, loss)
        with frozen(self.model), recomputed(self.model, self.recompute):
            for weight in weights.values():
                weight.requires_grad_(True)
            for part, dense in parts:
                with self._output_fisher(fisher, part):
                    with self.autocast():
                        value, terms = loss(self.model, part, self.task, dense)
                    if not value.requires_grad:
                        raise PermpruneError(f"{loss} has no gradient: compute it from the model's outputs")
                    value.backward()
                total, count = total + float(value.detach()), count + terms
        total, count = distributed.total(total, count)
        distributed.add_(list(fisher.values()))
        slopes = self._collect(weights, bool(self._share(examples)))
        mean = {name: slope / count for name, slope in slopes.items()}
        fisher = {name: f * loss.curvature / count for name, f in fisher.items()}
        covariance = {name: f for name, f in fisher.items() if f.dim() == 2}
        fisher |= {name: f.diagonal().clamp_min(SMALL * float(f.diagonal().mean())) for name, f in covariance.items()}
        return Gradients(mean, fisher, total / count, int(count), covariance)

    def _output_fisher(self, fisher: dict[str, Tensor], part: Examples) -> AbstractContextManager[None]:
        """A context in which the backward pass of a batch adds the rows' Fisher information to `fisher`."""
        alike, layers = self.statistics.one_label_per_example, list(self.layers.values())
        return output_fisher(layers, fisher, one_label_per_example=alike, padding=padding_of(self.model, part))

    def _no_fisher(self, weight: Tensor) -> Tensor:
        """Zeros for the Fisher information of a weight's rows, (rows,), or for the covariance of rows, (rows, rows)."""
        rows = len(weight)
        return weight.new_zeros((rows, rows) if self.statistics.one_label_per_example and rows <= COUPLED else rows)

    def _collect(self, weights: dict[str, nn.Parameter], asked: bool) -> dict[str, Tensor]:
        """Take the gradients from the parameters and sum them over the ranks; returns (rows, channels) by layer.

        `asked` is whether this rank ran any examples; if so, raises `PermpruneError` for a weight without a gradient.
        """
        gradients = {}
        for name, weight in weights.items():
            weight.requires_grad_(False)
            if weight.grad is None and asked:
                raise PermpruneError(
                    f"{name.removesuffix('.weight')} has no effect on the loss: "
                    "exclude it, or calibrate with inputs that use it"
                )
            gradients[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad = None
            distributed.add_([gradients[name]])
        return {name: layer.part_of(gradients[layer.parameter]).float() for name, layer in self.layers.items()}

    @torch.no_grad()
    def compute_teacher_outputs(self, examples: Examples, loss: Loss) -> list[TeacherOutputs] | None:
        """Return the dense model's outputs for this rank's batches of `examples`; None if the loss needs none."""
        if not loss.needs_teacher(self.task):
            return None
        found = []
        with frozen(self.model), self.dense_weights():
            for part in self._share(examples):
                with self.autocast():
                    found.append(loss.compute_teacher_outputs(self.model, part.to(self.device), self.task))
        return found

    def _parts(
        self, examples: Examples, loss: Loss, teacher_outputs: Sequence[TeacherOutputs] | None = None
    ) -> Iterator[tuple[Examples, TeacherOutputs | None]]:
        """Iterate over this rank's batches, on the model's device, with their teacher outputs or None."""
        parts = self._share(examples)
        known: Sequence[TeacherOutputs | None] = (
            teacher_outputs or self.compute_teacher_outputs(examples, loss) or [None] * len(parts)
        )
        return ((part.to(self.device), dense) for part, dense in zip(parts, known, strict=True))

    def _share(self, examples: Examples) -> Sequence[Examples]:
        """The batches of this rank."""
        return distributed.share(batches(examples, self.batch))
