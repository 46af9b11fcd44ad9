"""The losses that searches and training minimise: their interface, the default, and plain functions as losses.

The default is a weighted sum of the task's own loss and of distances to the dense model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from permprune.errors import PermpruneError
from permprune.options import NonNegative, described, require_fields
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F

    from permprune.examples import Examples
    from permprune.losses import targets
    from permprune.losses.cross_entropy import Logits
    from permprune.losses.targets import Embedding, Imitation, Task
    from permprune.models.forward import Padding, padding_of
    from permprune.models.hooks import attached
    from permprune.models.layers import blocks

ONE_LABEL_DIVERGENCE = 3.0
"""The weight of `Objective.divergence` where each example has one label."""

TRAINED_HIDDEN_STATES = 20.0
"""The weight of `Objective.hidden_states` in training where most positions have no label."""

EMBEDDED_HIDDEN_STATES = 4.0
"""The same for embeddings, which tell more of the states than a label does."""

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
        """Return the loss for training weights after a search; by default this loss."""
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


@dataclass(frozen=True)
class Objective(Loss):
    """A weighted sum of losses, each summed over the terms of a batch.

    Raises `PermpruneError` for a negative weight, and if all weights are 0.

    Attributes:
        task: Weight of the task's loss: the cross-entropy with the labels, or the distance to the dense model's outputs
            for an `Imitation`.
        divergence: Weight of the KL divergence from the dense model's predictions. Its gradient has the same mean as
            that of the cross-entropy, without the noise of individual labels. None lets `suited` choose the weight, and
            counts as 0 until then.
        distillation: Weight of the Smooth-L1 distance of every block's output to the dense model's, summed over
            positions, channels and blocks (Li et al. 2026, arXiv 2601.22980, "loss").
        hidden_states: Weight of the squared distance of every block's output to the dense model's, divided by the
            squared length of the latter; the mean over positions and blocks, for each term of the loss.
        cosine: Weight of 1 - the cosine similarity of the last block's output and the dense model's (PermLLM, Zou et
            al. 2025, "loss").
    """

    task: NonNegative = 1.0
    divergence: NonNegative | None = None
    distillation: NonNegative = 0.0
    hidden_states: NonNegative = 0.0
    cosine: NonNegative = 0.0

    def __post_init__(self) -> None:
        require_fields(self)
        if not (self.task or self.divergence or self.compares_blocks or self.cosine):
            raise PermpruneError(
                "all loss weights are 0: give task, divergence, distillation, hidden_states or cosine one above 0"
            )

    def suited(self, task: Task, one_label_per_example: bool) -> Objective:
        """Return this objective with `divergence` chosen for the data if it is None.

        With `one_label_per_example` there are few labels, and a search can lower their loss below the dense model's
        without predicting better. The divergence prevents this.
        """
        if self.divergence is not None:
            return self
        needed = one_label_per_example and not isinstance(task, Imitation)
        return replace(self, divergence=ONE_LABEL_DIVERGENCE if needed else 0.0)

    def for_training(self, task: Task) -> Objective:
        """Return this objective with the divergence and, where most positions have no label, `hidden_states`.

        Images have one label, and speech few tokens for 1500 frames: there the hidden states tell far more than the
        labels. For the next token of text, which every position predicts, they tell nothing more.
        """
        of_kind = EMBEDDED_HIDDEN_STATES if isinstance(task, Embedding) else TRAINED_HIDDEN_STATES
        hidden_states = self.hidden_states or (0.0 if task is targets.next_token else of_kind)
        return replace(self, divergence=1.0, hidden_states=hidden_states)

    @property
    def curvature(self) -> float:
        """The curvature of cross-entropy plus divergence, divided by the squared gradient of their sum.

        The Fisher information is the curvature of both. Near the dense model, however, the gradient of the divergence
        vanishes, and only the squared gradients of the cross-entropy estimate that information.
        """
        return (self.task + self.divergence) / self.task**2 if self.task and self.divergence else 1.0

    @property
    def compares_blocks(self) -> bool:
        return bool(self.distillation or self.hidden_states)

    def needs_teacher(self, task: Task) -> bool:
        return self.compares_blocks or bool(self.cosine) or self._compares_predictions(task)

    def _compares_predictions(self, task: Task) -> bool:
        return bool(self.divergence or (self.task and isinstance(task, Imitation)))

    def compute_teacher_outputs(self, model: nn.Module, batch: Examples, task: Task) -> TeacherOutputs:
        with self._block_outputs(model, batch) as outputs:
            predictions = task(model, batch)
        compared = outputs if self.compares_blocks else outputs[-1:] if self.cosine else []
        target = predictions.lazy_target() if self._compares_predictions(task) else None
        return TeacherOutputs(target, [output.cpu() for output in compared])

    def __call__(
        self, model: nn.Module, batch: Examples, task: Task, teacher_outputs: TeacherOutputs | None
    ) -> tuple[Tensor, int]:
        with self._block_outputs(model, batch) as outputs:
            predictions = task(model, batch)
        dense, divergence = teacher_outputs or TeacherOutputs(None, []), self.divergence or 0.0
        losses = []
        if self.task or divergence:
            losses.append(predictions.weighted_loss(dense.predictions, task=self.task, divergence=divergence))
        losses += self._distances(outputs, dense.block_outputs, predictions.terms)
        return torch.stack(losses).sum(), predictions.terms

    def _block_outputs(self, model: nn.Module, batch: Examples) -> AbstractContextManager[list[Tensor]]:
        """The context of `block_outputs`, which holds nothing if no loss compares them."""
        compared = self.compares_blocks or self.cosine
        return block_outputs(model, padding_of(model, batch)) if compared else nullcontext([])

    def _distances(self, outputs: list[Tensor], dense: list[Tensor], terms: int) -> list[Tensor]:
        """Return the weighted distances of the blocks' outputs to the dense model's."""
        losses = []
        if self.distillation:
            losses.append(self.distillation * _smooth_l1(outputs, dense))
        if self.hidden_states:
            losses.append(self.hidden_states * terms * relative_distance(outputs, dense))
        if self.cosine:
            last, target = outputs[-1].float(), dense[-1].to(outputs[-1].device).float()
            losses.append(self.cosine * (1 - F.cosine_similarity(last, target, dim=-1)).sum())
        return losses


@contextmanager
def block_outputs(model: nn.Module, padding: Padding) -> Iterator[list[Tensor]]:
    """Collect the outputs of the model's repeated blocks inside the context, without padding, in execution order."""
    outputs: list[Tensor] = []

    def keep(block: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(padding.real(output if isinstance(output, Tensor) else output[0], module=block))

    with attached(block.register_forward_hook(keep) for block in blocks(model)):
        yield outputs


def _smooth_l1(outputs: list[Tensor], dense: list[Tensor]) -> Tensor:
    """The Smooth-L1 distance between pairs of tensors of any shape, summed over all elements."""
    pairs = zip(outputs, dense, strict=True)
    losses = [F.smooth_l1_loss(x.float(), target.to(x.device).float(), reduction="sum") for x, target in pairs]
    return torch.stack(losses).sum()


def relative_distance(outputs: list[Tensor], dense: list[Tensor]) -> Tensor:
    """The squared distance of vectors (..., channels) over the squared length of `dense`, averaged over all of them.

    A vector of `dense` near 0 counts as one of a thousandth of the mean squared length, so that it does not dominate.
    """
    distances = []
    for output, target in zip(outputs, dense, strict=True):
        expected = target.to(output.device).float()
        length = expected.square().sum(-1)
        length = length.clamp_min((1e-3 * length.mean()).clamp_min(1e-12))
        distances.append(((output.float() - expected).square().sum(-1) / length).mean())
    return torch.stack(distances).mean()
