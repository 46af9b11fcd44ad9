"""Attention in bfloat16 on the CPU: torch's kernel beside permprune's, in turns.

For training, forward and backward passes in blocks; for decoding, single queries by the native library, and for prompts
and encoders all queries, where there are matrix units.

python benchmarks/attention.py --threads 2
"""

import argparse
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from permprune.models.autocast import BlockwiseAttention
from permprune.models.sdpa import attention

SHAPES = {
    "SmolLM2-135M, 4 windows of 512 tokens": (4, 9, 3, 512, 64, "causal"),
    "Qwen2.5-1.5B, 1 window of 2048 tokens": (1, 12, 2, 2048, 128, "causal"),
    "ViT-B/16, 32 images": (32, 12, 12, 197, 64, ""),
    "MiniLM-L6, 16 texts of 48 to 96 tokens": (16, 12, 12, 96, 32, "padding"),
}
"""Batch, query heads, key/value heads, tokens, channels of a head, and the mask."""

DECODING = {
    "SmolLM2-135M, 512 tokens": (1, 9, 3, 512, 64),
    "SmolLM2-135M, 8 sequences of 512 tokens": (8, 9, 3, 512, 64),
    "Qwen2.5-1.5B, 2048 tokens": (1, 12, 2, 2048, 128),
    "Llama-3-8B, 2048 tokens": (1, 32, 8, 2048, 128),
    "Llama-2-7B, 2048 tokens": (1, 32, 32, 2048, 128),
}
"""Batch, query heads, key/value heads, tokens, and channels of a head."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| | torch, ms | blocks, ms | ratio | error of torch | error of blocks |")
    print("|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        compare(name, *shape, turns=options.turns)
    print("\n| decoding | torch, ms | native, ms | ratio |\n|---|---|---|---|")
    for name, (batch, heads, shared, length, width) in DECODING.items():
        infer(name, (batch, heads, 1, width), (batch, shared, length, width), causal=False, turns=10 * options.turns)
    print("\n| all queries | torch, ms | native, ms | ratio |\n|---|---|---|---|")
    for name, (batch, heads, shared, length, width, masked) in SHAPES.items():
        sizes = (batch, heads, length, width), (batch, shared, length, width)
        infer(name, *sizes, causal=masked == "causal", turns=2 * options.turns)


def compare(
    name: str, batch: int, heads: int, shared: int, length: int, width: int, masked: str, *, turns: int
) -> None:
    """Print the fastest forward and backward pass of each, and the errors against float64 (relative, of the norm)."""
    torch.manual_seed(0)
    inputs = [torch.randn(batch, h, length, width).bfloat16().requires_grad_() for h in (heads, shared, shared)]
    arriving = torch.randn(batch, heads, length, width)
    options: dict[str, Any] = {"is_causal": masked == "causal", "enable_gqa": True}
    if masked == "padding":
        lengths = torch.randint(length // 2, length + 1, (batch, 1, 1, 1))
        options["attn_mask"] = (torch.arange(length) < lengths).expand(batch, 1, length, length)

    def run(blocks: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[list[torch.Tensor], list[float]]:
        given = inputs if dtype == torch.bfloat16 else [x.detach().to(dtype).requires_grad_() for x in inputs]
        started = time.perf_counter()
        if blocks:
            with BlockwiseAttention():
                result = F.scaled_dot_product_attention(*given, **options)
        else:
            result = F.scaled_dot_product_attention(*given, **options)
        halfway = time.perf_counter()
        gradients = torch.autograd.grad(result, given, arriving.to(dtype))
        return [result.detach(), *gradients], [halfway - started, time.perf_counter() - halfway]

    exact, _ = run(False, torch.float64)
    best, errors = {}, {}
    for turn in range(turns):
        for blocks in (False, True) if turn % 2 else (True, False):
            found, seconds = run(blocks)
            best[blocks] = list(map(min, best.get(blocks, seconds), seconds))
            errors[blocks] = max(float((x - e).norm() / e.norm()) for x, e in zip(found, exact, strict=True))
    torchs, own = (" + ".join(f"{1e3 * s:.1f}" for s in best[blocks]) for blocks in (False, True))
    ratio = sum(best[False]) / sum(best[True])
    print(f"| {name} | {torchs} | {own} | {ratio:.2f} | {errors[False]:.4f} | {errors[True]:.4f} |", flush=True)


def infer(name: str, queries: tuple[int, ...], read: tuple[int, ...], *, causal: bool, turns: int) -> None:
    """Print the fastest call of each; without a cache models transpose (batch, tokens, heads, width)."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(size).bfloat16() for size in (queries, read, read))
    if not causal and queries[2] > 1:
        query, key, value = (s.transpose(1, 2).contiguous().transpose(1, 2) for s in (query, key, value))
    module: Any = nn.Module()
    module.num_key_value_groups = queries[1] // read[1]
    best = [math.inf, math.inf]
    for turn in range(2 * turns):
        started = time.perf_counter()
        if turn % 2:
            attention(module, query, key, value, None, is_causal=causal)
        else:
            sdpa_attention_forward(module, query, key, value, None, is_causal=causal)
        best[turn % 2] = min(best[turn % 2], time.perf_counter() - started)
    torchs, own = best
    print(f"| {name} | {1e3 * torchs:.2f} | {1e3 * own:.2f} | {torchs / own:.1f} |", flush=True)


if __name__ == "__main__":
    main()
