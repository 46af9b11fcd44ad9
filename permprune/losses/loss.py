"""The interface of the losses that searches and training minimise, and an adapter for plain functions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from permprune.errors import PermpruneError
from permprune.options import described
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    from torch import Tensor, nn

    from permprune.examples import Examples
    from permprune.losses.output_layer import Logits
    from permprune.losses.targets import Task

if TYPE_CHECKING:
    LossFunction = Callable[[nn.Module, Examples], Tensor]
else:
    LossFunction = Callable  # without the names that are imported on first use
"""(model, batch) -> the loss of each term, a tensor of any shape; a scalar is the mean over the batch's examples."""


@dataclass(frozen=True)
class TeacherOutputs:
    """The dense model's outputs for one batch, on the CPU, as far as a loss needs them.

    `predictions` is the `lazy_target` of the task's outputs, or None; `block_outputs` are the outputs of the repeated
    blocks, without padding.
    """

    predictions: Logits | None
    block_outputs: list[Tensor]


class Loss(ABC):
    """The loss of a batch, summed over its terms; a term is a token of text or a whole example."""

    @abstractmethod
    def __call__(
        self, model: nn.Module, batch: Examples, task: Task, teacher_outputs: TeacherOutputs | None
    ) -> tuple[Tensor, int]:
        """Return (summed loss with its autograd graph, number of terms).

        `teacher_outputs` are the dense model's outputs for this batch, or None if the loss does not need them.
        """

    @property
    def curvature(self) -> float:
        """The curvature of the loss, divided by the sum of the squared gradients of its terms."""
        return 1.0

    def suited(self, task: Task, one_label_per_example: bool) -> Loss:
        """Return this loss with the weights that were left open set to suit the task; by default unchanged."""
        return self

    def for_training(self, task: Task) -> Loss:
        """Return the loss for training weights, between the rounds of a search or after them; by default this loss."""
        return self

    def needs_teacher(self, task: Task) -> bool:
        """Whether the loss needs the dense model's outputs."""
        return False

    @property
    def compares_blocks(self) -> bool:
        """Whether the loss needs the outputs of all blocks of the dense model."""
        return False

    def compute_teacher_outputs(self, model: nn.Module, batch: Examples, task: Task) -> TeacherOutputs:
        """Return the dense model's outputs for a batch; `model` must hold the dense weights."""
        return TeacherOutputs(None, [])


@dataclass(frozen=True, repr=False)
class FunctionLoss(Loss):
    """Wraps a function of model and batch as a loss.

    Searches estimate curvature from the gradients of single terms. A function that returns the loss of each term
    (`reduction="none"`) is therefore optimised better than one that returns their mean. Calling the loss raises
    `PermpruneError` if the function does not return a non-empty tensor.
    """

    function: LossFunction

    def __repr__(self) -> str:
        return described(self.function)

    def __call__(
        self, model: nn.Module, batch: Examples, task: Task, teacher_outputs: TeacherOutputs | None
    ) -> tuple[Tensor, int]:
        losses = self.function(model, batch)
        if not isinstance(losses, Tensor) or not losses.numel():
            raise PermpruneError(f"the loss {self!r} returned {losses!r:.80}: return a tensor, the loss of each term")
        return (losses * len(batch), len(batch)) if losses.dim() == 0 else (losses.sum(), losses.numel())


def as_loss(loss: Loss | LossFunction) -> Loss:
    """Return a `Loss` as it is, and wrap a function in a `FunctionLoss`. Raises `PermpruneError` for anything else."""
    if isinstance(loss, Loss):
        return loss
    if not callable(loss):
        raise PermpruneError(f"{loss!r:.80} is not a loss: give an Objective, or a function of model and batch")
    return FunctionLoss(loss)
