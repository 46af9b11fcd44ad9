"""The machine of a run and how fast it works: measured in a fraction of a second, or from the data sheet of a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial

from permprune.forecasts.resources import Work
from permprune.options import require_choice
from permprune.pattern import Pattern
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch

    from permprune.kernels.search.placement import add_placement_cost
    from permprune.system.device import best_device, fast_dtype

OF_SHEET = 0.5
"""The share of the rates of a data sheet that forecasts assume."""

OF_PRODUCTS, OF_COMPARISONS, OF_MOVED = 0.9, 0.6, 0.4
"""Shares of the rates measured on single operations that forecasts assume (benchmarks/forecasts.py): products of
narrower matrices are slower, and operations on elements compute more than the sum that is measured."""

DISK = 1e9
"""Bytes a second that forecasts assume to be read from disk or written to it."""

BUS = 25e9
"""Bytes a second that forecasts assume to travel between host and device: four fifths of the 31.5 GB/s of PCIe 4.0 with
16 lanes, since packets have headers."""

INSTRUCTIONS = 3
"""Instructions of an element operation on a GPU: a comparison and difference, a selection, and a sum."""

MEASURED = 0.1
"""Seconds for which each rate is measured."""


@dataclass(frozen=True)
class Rates:
    """Operations a second, of each kind in `Work`; those of `comparisons` are of one thread."""

    products: float
    products_fp32: float
    comparisons: float
    moved: float


@dataclass(frozen=True)
class Machine:
    """A machine that runs searches.

    `dtype` is the type of activations that it multiplies fastest, and `threads` the number of problems that it solves
    at a time. `memory` are the bytes of the device; None for a CPU, which computes in the memory of the host. `sheet`
    are the rates of a data sheet; None to measure them.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    threads: int = 1
    memory: int | None = None
    sheet: Rates | None = None

    @cached_property
    def rates(self) -> Rates:
        """The rates that forecasts assume."""
        if self.sheet is not None:
            return Rates(*(OF_SHEET * rate for rate in vars(self.sheet).values()))
        return _measured_rates(self.device, self.dtype, torch.get_num_threads())

    def seconds(self, work: Work) -> float:
        """Return the time that work takes, with the comparisons of the largest problem on one thread."""
        rates = self.rates
        return (
            work.products / rates.products
            + work.products_fp32 / rates.products_fp32
            + work.comparisons / rates.comparisons * max(1 / self.threads, work.largest)
            + work.moved / rates.moved
            + work.stored / DISK
            + work.carried / BUS
        )


@cache
def _measured_rates(device: torch.device, dtype: torch.dtype, threads: int) -> Rates:
    """The rates of this machine with so many threads, which PyTorch has."""
    products = {kind: _product_rate(kind, device, threads) for kind in {dtype, torch.float32}}
    return Rates(
        products=OF_PRODUCTS * products[dtype],
        products_fp32=OF_PRODUCTS * products[torch.float32],
        comparisons=OF_COMPARISONS * _comparison_rate(device),
        moved=OF_MOVED * _memory_rate(device, threads),
    )


def this_machine() -> Machine:
    """Return the machine that runs this process."""
    device = best_device()
    if device.type == "cpu":
        return Machine("this machine", device, fast_dtype(device), torch.get_num_threads())
    properties = torch.cuda.get_device_properties(device)
    return Machine(properties.name, device, fast_dtype(device), memory=properties.total_memory)


def _gpu(name: str, *, bf16: float, fp32: float, gib: int, bandwidth: float) -> Machine:
    """A GPU with the peak rates of its data sheet.

    They are TFLOPS of dense `bf16` products on tensor cores, with sums in fp32, and of `fp32` outside them, where a
    fused multiply-add counts as two operations. `gib` is the memory in GiB, and `bandwidth` its TB a second.
    """
    comparisons = fp32 * 1e12 / 2 / INSTRUCTIONS
    rates = Rates(products=bf16 * 1e12, products_fp32=fp32 * 1e12, comparisons=comparisons, moved=bandwidth * 1e12)
    return Machine(name, torch.device("cuda"), torch.bfloat16, memory=gib * 2**30, sheet=rates)


GPUS: Mapping[str, Callable[[], Machine]] = {
    "h100": partial(_gpu, "NVIDIA H100 SXM", bf16=989.4, fp32=66.9, gib=80, bandwidth=3.35),
    "h200": partial(_gpu, "NVIDIA H200", bf16=989.4, fp32=66.9, gib=141, bandwidth=4.8),
    "a100": partial(_gpu, "NVIDIA A100 80GB", bf16=312, fp32=19.5, gib=80, bandwidth=2.04),
    "rtx4090": partial(_gpu, "NVIDIA RTX 4090", bf16=165.2, fp32=82.6, gib=24, bandwidth=1.01),
}
"""GPUs by name. Sources: NVIDIA's data sheets of the H100, H200 and A100, and its white paper on the Ada architecture,
appendix A (docs/concepts/cost.md)."""


def machine_named(name: str | None) -> Machine:
    """Return the GPU of that name, or this machine if it is None. Raises `PermpruneError` for an unknown name."""
    if name is None:
        return this_machine()
    require_choice("gpu", name, GPUS)
    return GPUS[name]()


def _product_rate(dtype: torch.dtype, device: torch.device, threads: int) -> float:
    """Measure the floating-point operations a second of a product of two matrices."""
    size = 4096 if device.type == "cuda" else 512
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 * _calls_a_second(lambda: matrix @ matrix, device, threads)


def _comparison_rate(device: torch.device) -> float:
    """Measure the comparisons a second of `add_placement_cost`, which uses one thread of a CPU."""
    pattern, (groups, rows) = Pattern(2, 4), (1024, 4096) if device.type == "cuda" else (128, 1024)
    matrix = torch.rand(groups * pattern.m, rows, generator=torch.Generator().manual_seed(0)).to(device)
    cost, slots = torch.zeros(groups, groups, dtype=torch.float64), torch.zeros(groups, dtype=torch.int64)

    def compare() -> None:
        add_placement_cost(
            cost,
            *(matrix, matrix, matrix, matrix),
            curvature=matrix[:, 0],
            groups=torch.arange(len(matrix)).view(-1, pattern.m),
            slots=slots,
            pattern=pattern,
        )

    return groups**2 * rows * _calls_a_second(compare, device)


def _memory_rate(device: torch.device, threads: int) -> float:
    """Measure the bytes a second that a sum of two matrices, of the size of a block of `newton`, reads and writes."""
    size = 2**21
    first, second, total = torch.ones(3, size, device=device)
    return 3 * 4 * size * _calls_a_second(lambda: torch.add(first, second, out=total), device, threads)


def _calls_a_second(call: Callable[[], object], device: torch.device, threads: int = 1) -> float:
    """Measure how often a call could be made in a second.

    On a CPU the time is that of the processor, divided by the `threads` of the call: other processes hardly change it.
    It counts all calls together, as the system adds what the other threads used only now and then.
    """

    def now() -> float:
        if device.type != "cuda":
            return time.process_time() / threads
        torch.cuda.synchronize(device)
        return time.perf_counter()

    call()
    calls, started = 0, now()
    while (spent := now() - started) < MEASURED or not calls:
        call()
        calls += 1
    return calls / spent
