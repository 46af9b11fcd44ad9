"""One linear layer with a packed 2:4 weight, beside the same dense: a Markdown table of milliseconds and ratios.

`packed` is `permprune.kernels`; `dense` the same kernels with a dense weight (same tiles, same threads); both weights
are in huge pages, as in packed models that permprune loads. `torch` is `torch.nn.functional.linear` on a dense weight
of the activations' type, in memory as torch allocates it (in huge pages, too, with `THP_MEM_ALLOC_ENABLE=1`). They take
turns, every other turn in reverse order, because a product is slower the more of the cache the one before it has used.
The fastest of all turns counts, in processor time where one thread runs. Each product cycles through so many copies of
its weights that none is in the processor's cache.

`packed` is the product that the package chooses; with other `--kernels` the one for few rows up to 64 rows of
activations, and the one for many rows above. There, and of int4, there is no `dense`; these figures are rows of the
table `many-rows`.

python benchmarks/inference.py --threads 1 2 --batch 1 16
python benchmarks/inference.py --threads 1 2 --batch 512 --types fp32 --turns 8 --outputs 1536 --inputs 576
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rows import add
from torch import Tensor, nn

from permprune.kernels import library
from permprune.kernels.product import native
from permprune.kernels.product.layout import BLOCK, LARGEST_BATCH, Layout
from permprune.kernels.product.linear import multiply_native
from permprune.kernels.product.packed import PackedWeight, quantize
from permprune.pattern import Pattern
from permprune.system.memory import move_to_huge_pages

Product = Callable[[Tensor], Tensor]

CACHE = 1 << 27
"""Bytes that no processor's cache holds for one process."""
TYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "int8": (torch.int8, torch.float32),
    "int4": (torch.int4, torch.float32),
}
"""Of the weight, and of the activations."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--kernels", choices=library.names(), default=library.best().name)
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    options = parser.parse_args()
    print(f"{options.kernels}, {options.pattern}, {options.outputs} x {options.inputs}, ms\n")
    print("| type | batch | threads | packed | dense | torch | dense / packed | torch / packed | byte limit |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.types:
        torch.manual_seed(0)
        stored, activations = TYPES[name]
        pattern = Pattern.parse(options.pattern)
        weight = torch.randn(options.outputs, options.inputs)
        products, limit = layers(weight * pattern.mask(weight.abs()), pattern, stored, activations, options.kernels)
        for batch in options.batch:
            x = torch.randn(batch, options.inputs).to(activations)
            compared = products if batch <= LARGEST_BATCH else [products[0], products[-1]]
            check(compared, x)
            for threads in options.threads:
                torch.set_num_threads(threads)
                packed, *others = measure(compared, x, options.turns)
                times = {"packed": packed, "torch": others[-1]} | ({"dense": others[0]} if len(others) > 1 else {})
                cells = [f"{times[own]:.2f}" if own in times else "" for own in ("packed", "dense", "torch")]
                ratios = [f"{times[own] / packed:.2f}" if own in times else "" for own in ("dense", "torch")]
                print(f"| {' | '.join([name, str(batch), str(threads), *cells, *ratios])} | {limit:.2f} |", flush=True)
                shape = {own: getattr(options, own) for own in ("kernels", "pattern", "outputs", "inputs")}
                cell = (
                    {"table": "layers" if batch <= LARGEST_BATCH else "many-rows"}
                    | shape
                    | {"type": name, "batch": batch, "threads": threads}
                )
                found = times | {"byte_limit": limit}
                add(options.rows, cell, {own: round(value, 4) for own, value in found.items()})


def layers(
    weight: Tensor, pattern: Pattern, stored: torch.dtype, activations: torch.dtype, kernels: str
) -> tuple[list[Product], float]:
    """The weight packed, dense on the same kernels, and in torch; and the dense bytes over the packed ones."""
    packed = PackedWeight.pack(weight, pattern, stored)
    products = [cycle([_native(packed.blocks, kernels, packed.layout) for _ in range(copies(packed.nbytes))])]
    unpacked = packed.unpack(activations)
    if stored == torch.int4:
        dense_bytes = int(weight.numel() * (4 + 16 / BLOCK) / 8)
    else:
        values, scale = (weight, None) if stored != torch.int8 else quantize(weight)
        values = values.to(stored)
        dense_bytes = values.nbytes + (0 if scale is None else scale.nbytes)
        products.append(cycle([_native(values, kernels, scale=scale) for _ in range(copies(dense_bytes))]))
    products.append(cycle([_torch(unpacked.clone()) for _ in range(copies(unpacked.nbytes))]))
    return products, dense_bytes / packed.nbytes


def copies(size: int) -> int:
    return max(1, -(-CACHE // size))


def cycle(products: list[Product]) -> Product:
    """The products in turn, one a call."""

    def product(x: Tensor) -> Tensor:
        products.append(products.pop(0))
        return products[-1](x)

    return product


def _native(numbers: Tensor, kernels: str, layout: Layout | None = None, scale: Tensor | None = None) -> Product:
    """The product of a weight of its own copy, which lies where permprune puts weights when it loads a model."""
    held = nn.Module()
    held.register_buffer("numbers", numbers.clone())
    move_to_huge_pages(held)
    numbers = held.numbers
    described = native.describe(layout, numbers) if layout else native.describe_plain(numbers, scale)

    def product(x: Tensor, _owner: object = (numbers, scale)) -> Tensor:
        if layout and kernels == library.best().name:
            return multiply_native(described, x, layout.dtype, None, None)
        return native.multiply(described, x, kernels, many=len(x) > LARGEST_BATCH)

    return product


def _torch(weight: Tensor) -> Product:
    return lambda x: F.linear(x, weight)


def check(products: list[Product], x: Tensor) -> None:
    """All give the same, within the rounding of int8 activations."""
    found = [product(x).float() for product in products]
    assert all((other - found[0]).norm() < 0.02 * found[0].norm() for other in found)


def measure(products: list[Product], x: Tensor, turns: int) -> list[float]:
    """Milliseconds of each, the fastest of its turns."""
    fastest = [float("inf")] * len(products)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    order = list(enumerate(products))
    for _ in range(turns):
        order.reverse()
        for index, product in order:
            began = clock()
            product(x)
            fastest[index] = min(fastest[index], clock() - began)
    return [1000 * seconds for seconds in fastest]


if __name__ == "__main__":
    main()
