"""What a batch costs: the task losses and the distillation losses the searches minimise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permprune.layers import blocks

Loss = Callable[[nn.Module, Tensor], tuple[Tensor, int]]
"""(model, batch) -> (summed loss with its graph, number of terms summed)."""


def next_token(model: nn.Module, ids: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy of each next token of `ids` (batch, length), summed over batch * (length - 1) tokens."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    targets = ids[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return loss, targets.numel()


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


def layer_distance(outputs: list[Tensor], dense: list[Tensor]) -> Tensor:
    """Layer-wise distillation: the Smooth-L1 distances of block outputs to the dense model's, summed."""
    pairs = zip(outputs, dense, strict=True)
    return torch.stack([F.smooth_l1_loss(own.float(), taught.float(), reduction="sum") for own, taught in pairs]).sum()


def fast_dtype(device: torch.device) -> torch.dtype:
    """The activation type in which this device multiplies fastest without loss scaling: bf16 or fp32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    probe = getattr(torch.cpu, "get_capabilities", dict)  # newer releases of torch
    capabilities: dict[str, object] = probe() if device.type == "cpu" else {}
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32
