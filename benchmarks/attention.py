"""Attention in bfloat16 on the CPU: torch's kernel beside permprune's blocks, forward and backward, in turns.

python benchmarks/attention.py --threads 2
"""

import argparse
import time
from typing import Any

import torch
import torch.nn.functional as F

from permprune.models.autocast import BlockwiseAttention

SHAPES = {
    "SmolLM2-135M, 4 windows of 512 tokens": (4, 9, 3, 512, 64, "causal"),
    "Qwen2.5-1.5B, 1 window of 2048 tokens": (1, 12, 2, 2048, 128, "causal"),
    "ViT-B/16, 32 images": (32, 12, 12, 197, 64, ""),
    "MiniLM-L6, 16 texts of 48 to 96 tokens": (16, 12, 12, 96, 32, "padding"),
}
"""Batch, query heads, key/value heads, tokens, channels of a head, and the mask."""


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


if __name__ == "__main__":
    main()
