"""What a search minimises: the interface of losses, and functions as losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.losses.targets import Task
from permprune.options import described

LossFunction = Callable[[nn.Module, Examples], Tensor]
"""(model, batch) -> the loss of each term, a tensor of any shape; a scalar is the mean over the batch's examples."""


@dataclass(frozen=True)
class TeacherOutputs:
    """The dense model's outputs for a batch, on the CPU: what is kept of them (see `Task`), and the blocks' outputs."""

    predictions: Tensor | None
    block_outputs: list[Tensor]


class Loss(ABC):
    """The loss of a batch, a sum over terms: tokens of text, or whole examples."""

    @abstractmethod
    def __call__(
        self, model: nn.Module, batch: Examples, task: Task, teacher_outputs: TeacherOutputs | None
    ) -> tuple[Tensor, int]:
        """(the sum with its graph, the number of terms); `teacher_outputs` are those of this batch, if needed."""

    @property
    def curvature(self) -> float:
        """The curvature of the loss, divided by the sum of its terms' squared gradients."""
        return 1.0

    def suited(self, task: Task, one_label_per_example: bool) -> Loss:
        """This loss, with what it leaves open chosen for the data."""
        return self

    def with_divergence(self) -> Loss:
        """The loss by which weights are trained between the rounds of a search."""
        return self

    def needs_teacher(self, task: Task) -> bool:
        """Whether the dense model's outputs are needed."""
        return False

    def compute_teacher_outputs(self, model: nn.Module, batch: Examples, task: Task) -> TeacherOutputs:
        """The dense model's outputs for a batch; `model` must show the dense weights."""
        return TeacherOutputs(None, [])


@dataclass(frozen=True, repr=False)
class FunctionLoss(Loss):
    """A function of model and batch as a loss.

    The search takes its curvature from the gradients of single terms, so that a function which returns the loss of each
    term (`reduction="none"`) is searched better than one which returns their mean. Calling raises `PermpruneError`
    where the function does not return a tensor.
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
    """A loss as it is, and a function as a loss. Raises `PermpruneError` for anything else."""
    if isinstance(loss, Loss):
        return loss
    if not callable(loss):
        raise PermpruneError(f"{loss!r:.80} is no loss: give an Objective, or a function of model and batch")
    return FunctionLoss(loss)
