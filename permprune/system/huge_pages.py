"""Weights in huge pages of memory.

A product with one row of activations reads every weight once, so it is as fast as memory. With pages of 4 KiB a
processor spends a good part of that time looking up addresses, most of all in a virtual machine; huge pages, of 2 MiB
on x86-64, cover 512 times as much (`benchmarks/inference.py`). Linux gives them to memory that asks for it.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor, nn

HUGE = 1 << 21
"""Bytes of a huge page."""
ALIGNMENT = 64
"""Bytes to which tensors are aligned: a line of the processor's cache."""


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
