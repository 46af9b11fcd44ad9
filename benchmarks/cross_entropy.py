"""Losses of an output layer, and their gradients, by permprune and by torch: a Markdown table.

Hidden states and weights are random, in bf16. "distilled" is cross-entropy plus the KL divergence from a teacher, as in
training with the dense model. "projected" computes logits a few hundred terms at a time, together with the gradient of
the hidden states; "logits" computes all of them first, and then permprune's loss of them, "torch" the same with torch's
loss.

Seconds of processor time, the fastest of three, in alternation, and the memory that the process needed at its peak.

python benchmarks/cross_entropy.py --threads 1
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from permprune.losses.cross_entropy import Logits, Projected, cross_entropy, distilled_cross_entropy
from permprune.system.memory import peak_memory_mb, reset_peak_memory


def by_permprune(logits: Logits, labels: Tensor, target: Logits | None) -> Tensor:
    if target is None:
        return cross_entropy(logits, labels)
    return distilled_cross_entropy(logits, labels, target, label_weight=1.0, divergence_weight=1.0)


def projected(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
    dense = None if teacher is None else Projected(teacher, weight)
    return by_permprune(Projected(hidden, weight), labels, dense)


def from_logits(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
    dense = None if teacher is None else F.linear(teacher, weight)
    return by_permprune(F.linear(hidden, weight), labels, dense)


def by_torch(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
    logits = F.linear(hidden, weight).float()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    if teacher is None:
        return loss
    sides = logits.log_softmax(1), F.linear(teacher, weight).float().log_softmax(1)
    return loss + F.kl_div(*sides, reduction="sum", log_target=True)


WAYS = {"projected": projected, "logits": from_logits, "torch": by_torch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="+", type=int, default=[49_152, 151_936])
    parser.add_argument("--channels", nargs="+", type=int, default=[576, 1536], help="one for each number of classes")
    parser.add_argument("--terms", type=int, default=1022)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| classes | channels | loss | | loss alone | loss and gradient | MiB |")
    print("|---|---|---|---|---|---|---|")
    for classes, channels in zip(options.classes, options.channels, strict=True):
        weight = torch.randn(classes, channels).bfloat16() / channels**0.5
        hidden, teacher = torch.randn(2, options.terms, channels).bfloat16()
        labels = torch.randint(classes, (options.terms,))
        for label, dense in (("cross-entropy", None), ("distilled", teacher)):
            rows = measure(hidden, weight, labels, dense)
            for name, (forward, both, memory) in rows.items():
                print(f"| {classes} | {channels} | {label} | {name} | {forward:.2f} s | {both:.2f} s | {memory:.0f} |")
            ratios = [theirs / ours for ours, theirs in zip(rows["projected"][:2], rows["logits"][:2], strict=True)]
            print(
                f"| {classes} | {channels} | {label} | logits / projected | {ratios[0]:.2f} | {ratios[1]:.2f} | |",
                flush=True,
            )


def measure(hidden: Tensor, *others: Tensor | None) -> dict[str, tuple[float, float, float]]:
    """The time of the loss alone and with its gradient, and the memory at its peak, each the least of three."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in WAYS}
    for _ in range(3):
        for name, way in WAYS.items():
            found[name].append(once(way, hidden, *others))
    return {name: tuple(map(min, zip(*times, strict=True))) for name, times in found.items()}  # type: ignore[misc]


def once(way: Callable[..., Tensor], hidden: Tensor, *others: Tensor | None) -> tuple[float, float, float]:
    began = time.process_time()
    with torch.no_grad():
        way(hidden, *others)
    forward = time.process_time() - began
    reset_peak_memory()
    before = peak_memory_mb() or 0.0
    given = hidden.clone().requires_grad_()
    began = time.process_time()
    way(given, *others).backward()
    return forward, time.process_time() - began, (peak_memory_mb() or 0.0) - before


if __name__ == "__main__":
    main()
