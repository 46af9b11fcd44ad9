"""Losses of logits and their gradients by permprune and by torch, on random bf16 logits: a Markdown table.

"distilled" is cross-entropy plus the KL divergence from a teacher's logits, as in training with the dense model.

Seconds of processor time, and the memory that the process needed at its peak over what the logits and their gradient
take.

python benchmarks/cross_entropy.py --threads 1
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from permprune.losses.cross_entropy import cross_entropy, distilled_cross_entropy
from permprune.system.memory import keep_freed_memory, peak_memory_mb, reset_peak_memory


def by_torch(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def distilled(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    return distilled_cross_entropy(logits, labels, target, label_weight=1.0, divergence_weight=1.0)


def distilled_by_torch(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    sides = logits.float().log_softmax(1), target.float().log_softmax(1)
    return by_torch(logits, labels) + F.kl_div(*sides, reduction="sum", log_target=True)


LOSSES = {
    "cross-entropy": (cross_entropy, by_torch),
    "distilled": (distilled, distilled_by_torch),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="+", type=int, default=[49_152, 262_144])
    parser.add_argument("--terms", type=int, default=2044)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    print("| classes | loss | | loss alone | loss and gradient | MiB more |")
    print("|---|---|---|---|---|---|")
    for classes in options.classes:
        logits = torch.randn(options.terms, classes).bfloat16().requires_grad_()
        labels, target = torch.randint(classes, (options.terms,)), torch.randn(options.terms, classes).bfloat16()
        for label, losses in LOSSES.items():
            given = (logits, labels) if label == "cross-entropy" else (logits, labels, target)
            rows = {name: measure(loss, *given) for name, loss in zip(("ours", "torch"), losses, strict=True)}
            for name, (forward, both, memory) in rows.items():
                print(f"| {classes} | {label} | {name} | {forward:.2f} s | {both:.2f} s | {memory:.0f} |")
            ratios = [theirs / ours for ours, theirs in zip(rows["ours"][:2], rows["torch"][:2], strict=True)]
            print(f"| {classes} | {label} | torch / ours | {ratios[0]:.1f} | {ratios[1]:.1f} | |", flush=True)


def measure(loss: Callable[..., Tensor], logits: Tensor, *targets: Tensor) -> tuple[float, float, float]:
    """Processor time of the loss alone and with its gradient, the faster of three, and peak memory in MiB."""
    forward, both = [], []
    logits.grad = torch.zeros_like(logits)
    reset_peak_memory()
    before = peak_memory_mb() or 0.0
    for _ in range(3):
        began = time.process_time()
        with torch.no_grad():
            loss(logits, *targets)
        forward.append(time.process_time() - began)
        logits.grad = None
        began = time.process_time()
        loss(logits, *targets).backward()
        both.append(time.process_time() - began)
    return min(forward), min(both), (peak_memory_mb() or 0.0) - before


if __name__ == "__main__":
    main()
