"""The native library: loading it, the kernels that run on this machine, and checked calls of its functions.

The library is plain C that is called through ctypes, which releases the GIL while a function runs. The tensors that a
function reads or writes are checked here first (`require_layout`, `describe`, `multiply`). The contents of masks and
orders are checked by the library itself, which reads nothing outside the tensors, whatever they contain.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels.product.layout import BLOCK, FLOATS, Layout
from permprune.pattern import Pattern

LIBRARY = Path(__file__).with_name("libpermprune.dylib" if sys.platform == "darwin" else "libpermprune.so")
FORCED = "PERMPRUNE_KERNELS"
"""Environment variable that selects the kernels: one of `names()`, or "torch" for none of them."""


GRAIN = 1 << 20
"""Number of multiplications, or of numbers written, for which another thread is used.

That takes about 0.1 ms. For less, a second thread costs more than it saves: between products it spins, and where two
threads share a core, that slows all the rest down."""

NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
"""The numbers of data types in the library."""

REASONS = {
    1: "there is no memory for it",
    2: f"the kernels do not run on this processor: unset {FORCED}",
    3: "an order names channels that do not exist",
    4: "a code does not keep its pattern",
    5: "sizes, types or pointers contradict each other",
}
"""What the statuses of the library mean: `enum status` of library.h."""

JOBS = {
    **dict.fromkeys(("mask", "keep", "prune", "place", "apply"), "a step of the search"),
    "step": "a step of Adam",
    "attend": "attention to packed keys and values",
    "unpack_states": "unpacking keys and values",
    "pack_states": "packing keys and values",
}
"""The functions of the library that run a job, and what they do."""

_MASK, _POSITIONS, _PLAIN = range(3)


class Weights(ctypes.Structure):
    """`struct weights` of packed.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("blocks", "scale", "bias", "order")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "count", "slots")),
        *((name, ctypes.c_int32) for name in ("number", "bias_number", "kind", "half")),
    )


def available() -> bool:
    """Whether native kernels run here; the first time that they do not, a warning gives the reason."""
    return _kernels() is not None


def names() -> list[str]:
    """Return the names of the kernels that run on this processor, the best first."""
    library = _library()
    return [] if library is None else [name for _, name in _running(library)]


def describe(layout: Layout, blocks: Tensor, bias: Tensor | None = None, order: Tensor | None = None) -> Weights:
    """Return the tensors as the library reads them: as pointers, which are valid while the tensors stay in place.

    Raises `PermpruneError` if the tensors do not match (`Layout.require`), or if one is not contiguous or not on the
    CPU.
    """
    layout.require(blocks, bias, order)
    for tensor in (blocks, bias, order):
        if tensor is not None and not (tensor.is_contiguous() and tensor.device.type == "cpu"):
            raise PermpruneError("a packed weight has to be contiguous and on the CPU for native kernels")
    n, m = layout.pattern.n, layout.pattern.m
    return Weights(
        blocks=blocks.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        order=None if order is None else order.data_ptr(),
        rows=blocks.shape[0],
        width=layout.width,
        count=layout.count,
        slots=layout.slots,
        number=NUMBERS[layout.dtype],
        bias_number=0 if bias is None else NUMBERS[bias.dtype],
        kind=_POSITIONS if layout.positions else _MASK,
        half=2 * n == m and BLOCK // 2 % m == 0,
    )


def state_of(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """Return all that `describe` reads of a tensor: while it is the same, so is the description."""
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_cpu


def describe_plain(values: Tensor, scale: Tensor | None = None) -> Weights:
    """Describe a weight that keeps everything, values (rows, width), for int8 tables and as a baseline in benchmarks.

    `scale` is fp32 (rows, width / 64), for int8 only. Raises `PermpruneError` unless the width is a multiple of 64 and
    the tensors are contiguous and match.
    """
    rows, width = values.shape
    parts = [values] if scale is None else [values, scale]
    if width % BLOCK or not all(part.is_contiguous() and part.device.type == "cpu" for part in parts):
        raise PermpruneError(f"a plain weight has to be contiguous, on the CPU, and of a width that {BLOCK} divides")
    if (scale is None) == (values.dtype == torch.int8) or values.dtype not in NUMBERS:
        raise PermpruneError(f"a plain weight of {values.dtype} needs {'a scale' if scale is None else 'no scale'}")
    if scale is not None and (scale.dtype != torch.float32 or tuple(scale.shape) != (rows, width // BLOCK)):
        raise PermpruneError(f"a plain weight has a scale of shape {tuple(scale.shape)} and type {scale.dtype}")
    return Weights(
        blocks=values.data_ptr(),
        scale=None if scale is None else scale.data_ptr(),
        rows=rows,
        width=width,
        count=width // BLOCK,
        slots=BLOCK,
        number=NUMBERS[values.dtype],
        kind=_PLAIN,
    )


def multiply(weights: Weights, x: Tensor, kernels: str | None = None) -> Tensor:
    """Return x W^T + bias for contiguous x (batch, width) of fp32, bf16 or fp16, in the type of x: (batch, rows).

    `kernels` is one of `names()`, by default the best. Raises `PermpruneError` for other input.
    """
    library, index = _kernels(kernels) or (None, -1)
    if library is None:
        raise PermpruneError("native kernels are not available here")
    # The weights that the last product read have displaced torch from the processor's cache: each call of it here takes
    # about 10 us, ten times as long as in a loop of its own.
    shape = x.shape
    if x.dtype not in FLOATS or len(shape) != 2 or shape[1] != weights.width:
        raise PermpruneError(
            f"activations of shape {tuple(shape)} and type {x.dtype} do not fit a packed weight of "
            f"{weights.width} channels: give (batch, {weights.width}) of fp32, bf16 or fp16"
        )
    if not (x.is_contiguous() and x.is_cpu):
        raise PermpruneError("activations have to be contiguous and on the CPU for native kernels")
    batch = shape[0]
    output = x.new_empty(batch, weights.rows)
    if not output.numel():
        return output
    threads = _threads(batch * weights.rows * weights.count * weights.slots)
    status = library.permprune_multiply(
        weights, x.data_ptr(), NUMBERS[x.dtype], batch, output.data_ptr(), index, threads
    )
    if status == 3:
        raise PermpruneError(f"a channel order names channels outside 0 to {weights.width - 1}: pack the model again")
    _require_done(status, f"a product of {batch} rows with a packed weight")
    return output


def unpack(weights: Weights, first: int, output: Tensor, kernels: str | None = None) -> None:
    """Write rows of the weight with its zeros, from `first` on, to `output`.

    `output` is a contiguous (rows, width) of fp32, bf16 or fp16. Raises `PermpruneError` if it does not fit.
    """
    library, index = _kernels(kernels) or (None, -1)
    rows, width = output.shape
    fits = output.dtype in FLOATS and output.is_contiguous() and output.device.type == "cpu"
    if library is None or not fits or width != weights.width or not 0 <= first <= weights.rows - rows:
        raise PermpruneError(f"{rows} rows of a packed weight from {first} on cannot be unpacked to {output.dtype}")
    number, threads = NUMBERS[output.dtype], _threads(output.numel())
    status = library.permprune_unpack(weights, first, first + rows, output.data_ptr(), number, index, threads)
    _require_done(status, "unpacking a weight")


def row_off_pattern(weights: Weights, pattern: Pattern) -> int | None:
    """Return the first row of a packed weight whose codes do not keep the pattern, or None."""
    library, _ = _kernels() or (None, -1)
    if library is None or weights.kind == _PLAIN:
        raise PermpruneError("the codes of this weight cannot be checked by native kernels")
    row: int = library.permprune_check(weights, pattern.n, pattern.m)
    return None if row < 0 else row


def run(name: str, job: ctypes.Structure, work: int = 0) -> None:
    """Run a function of the library on a job of `work` elements.

    The functions are those in `JOBS`. Raises `PermpruneError` where native kernels are not available, or if what the
    job says contradicts itself.
    """
    library, index = _kernels() or (None, -1)
    if library is None:
        raise PermpruneError("native kernels are not available here")
    status = getattr(library, f"permprune_{name}")(ctypes.byref(job), index, _threads(work))
    _require_done(status, JOBS[name])


def _require_done(status: int, job: str) -> None:
    if status:
        raise PermpruneError(f"{job} failed: {REASONS[status]}")


def _threads(work: int) -> int:
    return min(torch.get_num_threads(), 1 + work // GRAIN)


@cache
def _kernels(wanted: str | None = None) -> tuple[ctypes.CDLL, int] | None:
    """Return the library and the index of the kernels to use, or None to use only PyTorch."""
    forced = wanted or os.environ.get(FORCED)
    library = None if forced == "torch" else _library()
    if library is None:
        return None
    running = _running(library)
    for index, name in running:
        if forced in (None, name):
            return library, index
    choices = ", ".join([name for _, name in running] + ["torch"])
    raise PermpruneError(f"{FORCED} asks for kernels {forced!r}, which do not run here: choose {choices}")


def _running(library: ctypes.CDLL) -> list[tuple[int, str]]:
    """Return index and name of the kernels that run on this processor, the best first."""
    found: list[tuple[int, str]] = []
    while (name := library.permprune_kernels(len(found))) is not None:
        found.append((len(found), name.decode()))
    return [(index, name) for index, name in found if name]


@cache
def _library() -> ctypes.CDLL | None:
    """Load the library; returns None, with a warning, if it is missing, does not load, or is older than this module."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
        _declare(library)
    except (OSError, AttributeError) as error:  # AttributeError: a function is missing
        warnings.warn(
            f"permprune's native kernels do not load ({error}): PyTorch takes their place, slowly; install permprune "
            "again, or run hatch_build.py in a checkout",
            stacklevel=4,
        )
        return None
    library.permprune_use_threads_of(_parallel_region())
    return library


def _declare(library: ctypes.CDLL) -> None:
    """Declare the types of the library's functions. Raises `AttributeError` if it lacks one."""
    pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    weights = ctypes.POINTER(Weights)
    library.permprune_kernels.argtypes = [number]
    library.permprune_kernels.restype = ctypes.c_char_p
    library.permprune_multiply.argtypes = [weights, pointer, number, count, pointer, number, number]
    library.permprune_multiply.restype = number
    library.permprune_unpack.argtypes = [weights, count, count, pointer, number, number, number]
    library.permprune_unpack.restype = number
    library.permprune_check.argtypes = [weights, number, number]
    library.permprune_check.restype = count
    for name in JOBS:
        function = getattr(library, f"permprune_{name}")
        function.argtypes, function.restype = [pointer, number, number], number
    library.permprune_use_threads_of.argtypes = [pointer]
    library.permprune_use_threads_of.restype = None


def _parallel_region() -> ctypes.c_void_p | None:
    """Return `GOMP_parallel` of the OpenMP runtime that torch uses, or None; libgomp, libomp and libiomp have it."""
    folder = Path(torch.__file__).parent
    files = [path for path in (folder / "lib").glob("lib*omp*") if "omp" in path.name.split(".")[0]]
    if sys.platform == "linux":  # torch from a package manager has the runtime elsewhere
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        loaded = {Path(line.split(maxsplit=5)[5]) for line in maps if len(line.split(maxsplit=5)) == 6}
        files += sorted(path for path in loaded if path.name.startswith(("libgomp", "libomp", "libiomp")))
    for path in files:
        try:
            runtime = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):  # not loaded, or another library
            continue
    return None
