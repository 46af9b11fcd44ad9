"""The loss of a batch: the task's own loss, and distances to the dense model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.losses.targets import Imitation, Task
from permprune.models.layers import blocks
from permprune.models.padding import real
from permprune.options import NonNegative, require_fields

ANSWERED_ONCE = 3.0
"""The weight of `Objective.divergence` where the data give one answer an example."""


@dataclass(frozen=True)
class TeacherOutputs:
    """The dense model's outputs for a batch, on the CPU: what is kept of them (see `Task`), and the blocks' outputs."""

    predictions: Tensor | None
    block_outputs: list[Tensor]


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses, each summed over the terms of a batch. The fields are their weights.

    `task`: cross-entropy with the labels; for an `Imitation`, the distance to the dense model. `divergence`: KL
    divergence from the dense model's predictions. Its gradient has the same mean as that of the labels, without the
    noise of single labels. None lets `suited` choose; until then it counts as 0. `distillation`: Smooth-L1 distance of
    every block's output to the dense model's, summed over positions, channels and blocks (Li et al. 2026, arXiv
    2601.22980, "loss"). `cosine`: 1 - the cosine similarity of the last block's output and the dense model's (PermLLM,
    Zou et al. 2025, "loss"). Raises
    `PermpruneError` for a negative weight, and where all of them are 0.
    """

    task: NonNegative = 1.0
    divergence: NonNegative | None = None
    distillation: NonNegative = 0.0
    cosine: NonNegative = 0.0

    def __post_init__(self) -> None:
        require_fields(self)
        if not (self.task or self.divergence or self.distillation or self.cosine):
            raise PermpruneError("all losses weigh 0: give task, divergence, distillation or cosine a weight above 0")

    def suited(self, task: Task, one_label_per_example: bool) -> Objective:
        """This objective, with a `divergence` chosen for the data if it is None.

        With `one_label_per_example` labels are few, and a search can bring their loss below the dense model's without
        better predictions. The divergence prevents this.
        """
        if self.divergence is not None:
            return self
        return replace(
            self, divergence=ANSWERED_ONCE if one_label_per_example and not isinstance(task, Imitation) else 0.0
        )

    @property
    def curvature(self) -> float:
        """The curvature of cross-entropy and divergence together, divided by the squared gradient of their sum.

        The Fisher information is the curvature of both, but near the dense model only the squared gradients of the
        labels' loss add up to it.
        """
        return (self.task + self.divergence) / self.task**2 if self.task and self.divergence else 1.0

    def needs_teacher(self, task: Task) -> bool:
        """Whether the dense model's outputs are needed."""
        return bool(self.distillation or self.cosine) or self._keeps(task)

    def _keeps(self, task: Task) -> bool:
        return bool(self.divergence or (self.task and isinstance(task, Imitation)))

    def compute_teacher_outputs(self, model: nn.Module, batch: Examples, task: Task) -> TeacherOutputs:
        """The dense model's outputs for a batch; `model` must show the dense weights."""
        with block_outputs(model) as outputs:
            said = task(model, batch)
        kept = outputs if self.distillation else outputs[-1:] if self.cosine else []
        return TeacherOutputs(said.kept() if self._keeps(task) else None, [output.cpu() for output in kept])

    def __call__(
        self, model: nn.Module, batch: Examples, task: Task, teacher_outputs: TeacherOutputs | None
    ) -> tuple[Tensor, int]:
        """(loss with its graph, number of terms); `teacher_outputs` are those of this batch."""
        with block_outputs(model) as outputs:
            said = task(model, batch)
        losses = [self.task * said.loss(teacher_outputs.predictions if teacher_outputs else None)] if self.task else []
        if teacher_outputs is not None and self.divergence:
            losses.append(self.divergence * said.distance(teacher_outputs.predictions))
        if teacher_outputs is not None and self.distillation:
            losses.append(self.distillation * _distance(outputs, teacher_outputs.block_outputs))
        if teacher_outputs is not None and self.cosine:
            own, dense = outputs[-1].float(), teacher_outputs.block_outputs[-1].to(outputs[-1].device).float()
            losses.append(self.cosine * (1 - F.cosine_similarity(own, dense, dim=-1)).sum())
        return torch.stack(losses).sum(), said.terms


@contextmanager
def block_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the output of every repeated block of the model, without padding, in the order in which they run."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(real(output if isinstance(output, Tensor) else output[0]))

    handles = [block.register_forward_hook(keep) for block in blocks(model)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _distance(outputs: list[Tensor], dense: list[Tensor]) -> Tensor:
    pairs = zip(outputs, dense, strict=True)
    return torch.stack(
        [F.smooth_l1_loss(own.float(), target.to(own.device).float(), reduction="sum") for own, target in pairs]
    ).sum()
