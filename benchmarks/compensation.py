"""The time of compensation (`updates.methods`) of one layer with products in bf16, beside fp32: a Markdown table.

Inputs are random, with channels of different sizes that are mixed. Both take turns, and the fastest of all turns
counts; "error" is the output error with products in bf16, relative to that in fp32.

python benchmarks/compensation.py --shapes 1536x576 8960x1536 --threads 1
"""

import argparse
import time
from unittest.mock import patch

import torch
from torch import Tensor

from permprune.pattern import Pattern
from permprune.updates.methods import ADMM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1536x576", "4096x1024"], help="channels x rows")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| channels x rows | fp32, s | bf16, s | times | error |\n|---|---|---|---|---|", flush=True)
    for shape in options.shapes:
        channels, rows = map(int, shape.split("x"))
        weight, moments = example(channels, rows)
        seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
        errors: dict[torch.dtype, float] = {}
        for _ in range(options.turns):
            for dtype, taken in seconds.items():
                began = time.perf_counter()
                with patch("permprune.updates.methods.fast_dtype", lambda _, dtype=dtype: dtype):
                    pruned = ADMM().apply(weight, moments, torch.arange(channels), Pattern(2, 4))
                taken.append(time.perf_counter() - began)
                lost = pruned - weight
                errors[dtype] = float(((lost @ moments) * lost).sum())
        wide, narrow = map(min, seconds.values())
        error = errors[torch.bfloat16] / errors[torch.float32]
        print(f"| {shape} | {wide:.2f} | {narrow:.2f} | {wide / narrow:.2f} | {error:.4f} |", flush=True)


def example(channels: int, rows: int) -> tuple[Tensor, Tensor]:
    """A weight (rows, channels), and the second moments of its inputs (channels, channels)."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-1, 1, channels)[torch.randperm(channels, generator=generator)]
    inputs = torch.randn(2 * channels, channels, generator=generator) * sizes
    mixing = torch.eye(channels) + 0.7 * torch.randn(channels, channels, generator=generator) / channels**0.5
    inputs = inputs @ mixing
    return torch.randn(rows, channels, generator=generator) / 50, inputs.T @ inputs / len(inputs)


if __name__ == "__main__":
    main()
