"""What a batch costs: the task's own loss, and the distances to the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permprune.examples import Examples
from permprune.layers import blocks


@dataclass(frozen=True)
class Predictions:
    """What a model says of a batch: `logits` (terms, classes) with their graph, and the right `labels` (terms,)."""

    logits: Tensor
    labels: Tensor

    @property
    def loss(self) -> Tensor:
        """Cross-entropy, summed over the terms."""
        return F.cross_entropy(self.logits.float(), self.labels, reduction="sum")


Task = Callable[[nn.Module, Examples], Predictions]
"""(model, batch) -> predictions."""


def next_token(model: nn.Module, batch: Examples) -> Predictions:
    """Each next token of the batch's "input_ids" (batch, length): batch * (length - 1) terms."""
    logits = model(**batch, use_cache=False).logits[:, :-1]
    return Predictions(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())


@dataclass(frozen=True)
class Taught:
    """What the dense model said of a batch, on the CPU: fp16 log-probabilities (terms, classes), block outputs."""

    log_probabilities: Tensor | None
    outputs: list[Tensor]


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses; each is summed over the terms of a batch.

    `task`: cross-entropy of the labels. `divergence`: KL divergence from the dense model's predictions, which has the
    same gradient in the mean but none of the noise of single labels. `distillation`: Smooth-L1 distance of every
    block's output to the dense model's, summed over channels and blocks (Li et al. 2026, arXiv 2601.22980, "loss").
    `cosine`: 1 - the cosine of the last block's output with the dense one (PermLLM, Zou et al. 2025, "loss").
    """

    task: float = 1.0
    divergence: float = 0.0
    distillation: float = 0.0
    cosine: float = 0.0

    @property
    def taught(self) -> bool:
        """Whether the dense model has to be asked."""
        return bool(self.divergence or self.distillation or self.cosine)

    def teach(self, model: nn.Module, batch: Examples, task: Task) -> Taught:
        """Ask the dense model, which `model` must show."""
        with block_outputs(model) as outputs:
            said = task(model, batch).logits
        kept = outputs if self.distillation else outputs[-1:] if self.cosine else []
        log_probabilities = said.float().log_softmax(-1).half().cpu() if self.divergence else None
        return Taught(log_probabilities, [output.cpu() for output in kept])

    def __call__(self, model: nn.Module, batch: Examples, task: Task, taught: Taught | None) -> tuple[Tensor, int]:
        """(loss with its graph, number of terms); `taught` is what `teach` gave for this batch."""
        with block_outputs(model) as outputs:
            said = task(model, batch)
        losses = [self.task * said.loss] if self.task else []
        if taught is not None and taught.log_probabilities is not None:
            dense = taught.log_probabilities.to(said.logits.device).float().log_softmax(-1)  # mends the rounding
            losses.append(
                self.divergence * F.kl_div(said.logits.float().log_softmax(-1), dense, reduction="sum", log_target=True)
            )
        if taught is not None and self.distillation:
            losses.append(self.distillation * _distance(outputs, taught.outputs))
        if taught is not None and self.cosine:
            own, dense = outputs[-1].float(), taught.outputs[-1].to(outputs[-1].device).float()
            losses.append(self.cosine * (1 - F.cosine_similarity(own, dense, dim=-1)).sum())
        return torch.stack(losses).sum(), len(said.labels)


@contextmanager
def block_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the output of every repeated block of the model, in the order in which they run."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    handles = [block.register_forward_hook(keep) for block in blocks(model)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _distance(outputs: list[Tensor], dense: list[Tensor]) -> Tensor:
    pairs = zip(outputs, dense, strict=True)
    return torch.stack(
        [F.smooth_l1_loss(own.float(), taught.to(own.device).float(), reduction="sum") for own, taught in pairs]
    ).sum()


def fast_dtype(device: torch.device) -> torch.dtype:
    """The activation type in which this device multiplies fastest without loss scaling: bf16 or fp32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    probe = getattr(torch.cpu, "get_capabilities", dict)  # newer releases of torch
    capabilities: dict[str, object] = probe() if device.type == "cpu" else {}
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32
