"""The peak memory of this process, the memory that it has freed, and huge pages for weights.

A product with one row of activations reads every weight once, so it is as fast as memory. With pages of 4 KiB a
processor spends a good part of that time looking up addresses, most of all in a virtual machine; huge pages, of 2 MiB
on x86-64, cover 512 times as much (`benchmarks/inference.py`). Linux gives them to memory that asks for it.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path

from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import psutil
    import torch
    from torch import Tensor, nn

M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -4, -3, -1
"""Options of glibc's `mallopt`."""

ACTIVATIONS = 2**25
"""The largest tensors that `keep_activations` keeps, in bytes: the largest M_MMAP_THRESHOLD that glibc takes."""

HUGE = 1 << 21
"""Bytes of a huge page."""
ALIGNMENT = 64
"""Bytes to which tensors are aligned: a line of the processor's cache."""


def reset_peak_memory() -> None:
    """Reset the peak memory, if the system supports it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # on other systems the peak is that since the start of the process


def peak_memory_mb() -> float | None:
    """Return the largest resident memory since the last reset, in MiB; None if the system does not report it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        pass  # not Linux
    try:
        import resource
    except ImportError:  # Windows, where psutil reads the peak
        peak: int | None = getattr(psutil.Process().memory_info(), "peak_wset", None)
        return None if peak is None else peak / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def keep_freed_memory() -> None:
    """Let this process keep and reuse memory that it has freed, if the C library is glibc.

    By default every large tensor is mapped anew, and the system has to clear its pages; without this a gradient takes a
    third less time on a CPU. For M_MMAP_MAX and M_TRIM_THRESHOLD see the manual page of `mallopt`.
    """
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
        _call_libc("mallopt", option, value)


def keep_activations() -> None:
    """Let this process keep and reuse a few times `ACTIVATIONS` of what it has freed, if the C library is glibc.

    Packed encoders take a tenth less time in batches, and dense models almost as much. Of what is larger, all goes back
    to the system, so that a program of the user's own stays small.
    """
    for option, value in ((M_MMAP_THRESHOLD, ACTIVATIONS), (M_TRIM_THRESHOLD, 8 * ACTIVATIONS)):
        _call_libc("mallopt", option, value)


def release_freed_memory() -> None:
    """Return to the system what `keep_freed_memory` kept: the next work may need other sizes, or other threads."""
    _call_libc("malloc_trim", 0)


def _call_libc(name: str, *arguments: int) -> None:
    """Call a function of the C library, if it has one of that name."""
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return
    function(*arguments)


def move_to_huge_pages(model: nn.Module) -> None:
    """Move the parameters and buffers of a model that are on the CPU into huge pages, in place.

    Parameters stay the same objects, and tensors that share memory still do; those of which others are a part are left
    where they are. Does nothing for models smaller than a huge page, or where the system has none to give.
    """
    by_storage: dict[int, list[Tensor]] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    sizes = {
        address: tensors[0].nbytes
        for address, tensors in by_storage.items()
        if all(0 < tensor.nbytes == tensor.untyped_storage().nbytes() for tensor in tensors)
    }
    allocated = _allocate([*sizes.values()])
    if allocated is None:
        return
    memory, starts = allocated
    places = dict(zip(sizes, starts, strict=True))

    def moved(tensor: Tensor) -> Tensor | None:
        start = places.get(tensor.untyped_storage().data_ptr())
        if start is None:
            return None
        new = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
        return new.view(tensor.shape).copy_(tensor)

    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if (data := moved(parameter.data)) is not None:
                parameter.data = data
        for name, buffer in module._buffers.items():  # a new tensor: as a view, a buffer would keep its old memory
            if buffer is not None and (data := moved(buffer)) is not None:
                module._buffers[name] = data


def _allocate(sizes: Sequence[int]) -> tuple[mmap.mmap, list[int]] | None:
    """Return memory for tensors of these sizes in bytes, and where each begins; None if huge pages would not help."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or sum(sizes) < HUGE:
        return None
    aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    memory = mmap.mmap(-1, sum(aligned) + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(advice)
    except OSError:  # a kernel without huge pages
        return None
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE
    return memory, [*itertools.accumulate(aligned[:-1], initial=first)]
