"""What searches find, and in how many seconds: Markdown tables.

python benchmarks/search.py
python benchmarks/search.py --model smollm2-135m

The searches are those for the most kept score, on matrices and on the layers of a model.

2:4 in the natural order keeps less of sum |w| than the best half of every row; efficacy (Pool and Yu 2021) is the share
of that gap won back. Their published figures are for numpy's uniform 128 x 64 matrix of seed 1, on a V100:
apex/contrib/sparsity/permutation_tests/README.md of github.com/NVIDIA/apex.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rows import add
from torch import Tensor

from permprune.checkpoints.io import read_model
from permprune.models.layers import prunable_layers
from permprune.pattern import Pattern
from permprune.permuters.cp import search
from permprune.permuters.kept import kept_score, ria_order

PATTERN = Pattern(2, 4)
PUBLISHED = {
    "published: pairs, 1000 escapes": (35.6, 1.387),
    "published: triples, no escapes": (36.6, 0.860),
}


def cp(escapes: int) -> Callable[[Tensor], Tensor]:
    def order(score: Tensor) -> Tensor:
        groups = torch.arange(len(score)).view(-1, PATTERN.m)
        return search(score, groups, PATTERN, torch.Generator().manual_seed(0), escapes).flatten()

    return order


METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "deal + assignments (ria)": lambda score: ria_order(score, PATTERN),
    "cp, no escapes": cp(0),
    "cp, 100 escapes": cp(100),
    "cp, 300 escapes": cp(300),
}


def efficacy(score: Tensor, order: Tensor) -> float:
    """In percent; `score` is (channels, rows)."""
    none, kept = (
        float(kept_score(score, some.view(-1, PATTERN.m), PATTERN).sum()) for some in (torch.arange(len(score)), order)
    )
    best = float(score.double().sort(0).values[len(score) // 2 :].sum())
    return 100 * (kept - none) / (best - none)


def measure(method: Callable[[Tensor], Tensor], score: Tensor) -> tuple[float, float]:
    """Efficacy in percent, and seconds."""
    started = time.perf_counter()
    order = method(score)
    seconds = time.perf_counter() - started
    return efficacy(score, order), seconds


def normal(channels: int, rows: int, seed: int) -> Tensor:
    return torch.randn(channels, rows, generator=torch.Generator().manual_seed(seed)).abs()


def narrow(seeds: int, path: Path | None) -> None:
    print(f"\n128 x 64, 2:4; normal: mean of {seeds} seeds\n")
    print("| method | efficacy, published matrix | efficacy, normal | seconds | slowest |\n|---|---|---|---|---|")
    for name, (percent, seconds) in PUBLISHED.items():
        print(f"| {name} | {percent:.1f} % | | {seconds:.2f} (V100) | |")
    published = torch.tensor(np.random.RandomState(1).rand(128, 64).T.copy(), dtype=torch.float32)
    for name, method in METHODS.items():
        method(published)  # tables that are built once, and warm caches
        rows = [measure(method, score) for score in (published, *(normal(64, 128, seed) for seed in range(seeds)))]
        mean = sum(percent for percent, _ in rows[1:]) / seeds
        seconds = [second for _, second in rows]
        print(
            f"| {name} | {rows[0][0]:.1f} % | {mean:.1f} % | {sum(seconds) / len(rows):.3f} | {max(seconds):.3f} |",
            flush=True,
        )
        for matrix, value in {"published": rows[0][0], f"normal, {seeds} seeds": mean}.items():
            add(path, {"table": "kept-score", "matrix": matrix, "method": name}, {"efficacy": round(value, 2)})


def square() -> None:
    print("\n1024 x 1024 normal, 2:4\n\n| method | efficacy | seconds |\n|---|---|---|")
    name = "deal + assignments (ria)"
    percent, seconds = measure(METHODS[name], normal(1024, 1024, 0))
    print(f"| {name} | {percent:.1f} % | {seconds:.3f} |", flush=True)


def real(name: str, escapes: int, path: Path | None) -> None:
    """The first layer of each shape, scored by magnitude."""
    print(
        f"\n{name}, magnitudes, 2:4\n\n| layer | rows x channels | method | efficacy | seconds |\n|---|---|---|---|---|"
    )
    layers = {tuple(layer.weight.shape): layer for layer in reversed(prunable_layers(read_model(name)[0], PATTERN))}
    methods = {"ria": METHODS["deal + assignments (ria)"], f"cp, {escapes} escapes": cp(escapes)}
    for (rows, channels), layer in layers.items():
        score = layer.weight.detach().float().cpu().abs().T.contiguous()
        for method, order in methods.items():
            percent, seconds = measure(order, score)
            print(f"| {layer.name} | {rows} x {channels} | {method} | {percent:.1f} % | {seconds:.2f} |", flush=True)
            cell = {"table": "kept-score", "matrix": layer.name, "method": method}
            add(path, cell, {"rows": rows, "channels": channels, "efficacy": round(percent, 2)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="normal 128 x 64 matrices")
    parser.add_argument("--model", help="measure layers of this model in place of random matrices")
    parser.add_argument("--escapes", type=int, default=100, help="of cp on the layers of the model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=Path, help="file of efficacies, one JSON object a line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.model:
        real(options.model, options.escapes, options.rows)
    else:
        narrow(options.seeds, options.rows)
        square()


if __name__ == "__main__":
    main()
