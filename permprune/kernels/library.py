"""The native library: loading it, the kernels that run on this processor, and calls of its functions.

The library is plain C that is called through ctypes, which releases the GIL while a function runs. Its structures are
declared in C alone (`STRUCTURE` of numbers.h): `structure` makes their twins from the declarations, which the library
holds. The tensors that a function reads or writes are checked by its callers; sizes, types, and the contents of masks
and orders by the library itself, which reads nothing outside the tensors, whatever they contain.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import sources

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
    "compress": "a product with a masked weight",
    **dict.fromkeys(("square", "step"), "a step of Adam"),
    "attend": "attention to packed keys and values",
    "attend_many": "attention",
    "unpack_states": "unpacking keys and values",
}
"""The functions of the library that run a job, each of a structure of its name, and what they do."""

_TYPES: dict[str, Any] = {
    "int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "uint32_t": ctypes.c_uint32, "float": ctypes.c_float,
}  # fmt: skip

_POINTED = {
    "float": (torch.float32,),
    "double": (torch.float64,),
    "uint8_t": (torch.uint8, torch.bool),
    "uint16_t": (torch.bfloat16,),
    "int64_t": (torch.int64,),
}
"""The types of the tensors for which a pointer to these stands; other pointers are to numbers of a type of the job."""


def available() -> bool:
    """Whether native kernels run here; the first time that they do not, a warning gives the reason."""
    return chosen() is not None


def names() -> list[str]:
    """Return the names of the kernels that run on this processor, the best first."""
    library = load()
    return [] if library is None else [name for _, name in _running(library)]


def run(name: str, work: int = 0, **members: Any) -> None:
    """Run a function of `JOBS` on a job with these members (`structure`) and of `work` elements.

    Raises `PermpruneError` where native kernels are not available, or if what the job says contradicts itself.
    """
    library, index = require()
    job = structure(name, **members)
    status = getattr(library, f"permprune_{name}")(ctypes.byref(job), index, threads(work))
    require_done(status, JOBS[name])


def structure(name: str, **members: Any) -> Any:
    """Return a structure of the library with these members, zero or NULL where there are none.

    A tensor stands for a pointer to its data, which is valid while the tensor stays in place, a tuple for an array, and
    a dict for a structure. Raises `TypeError` for a member that it does not have, or a tensor of another type than the
    library reads or not on the CPU.
    """
    kind: Any = _structures()[name]
    types = kind.types
    if not members.keys() <= types.keys():
        unknown = sorted(members.keys() - types.keys())
        raise TypeError(f"struct {name} of the native library has no {', '.join(unknown)}")
    return kind(**{member: _value(value, types[member]) for member, value in members.items()})


def require(kernels: str | None = None) -> tuple[ctypes.CDLL, int]:
    """Return `chosen`. Raises `PermpruneError` where native kernels are not available."""
    if selected := chosen(kernels):
        return selected
    raise PermpruneError("native kernels are not available here")


def require_done(status: int, job: str) -> None:
    """Raise `PermpruneError` for the status of a function that has not done its job."""
    if status:
        raise PermpruneError(f"{job} failed: {REASONS[status]}")


def threads(work: int) -> int:
    """Return the number of threads for `work` elements."""
    return min(torch.get_num_threads(), 1 + work // GRAIN)


@cache
def chosen(kernels: str | None = None) -> tuple[ctypes.CDLL, int] | None:
    """Return the library and the index of the kernels to use, one of `names()` or the best; None to use only PyTorch.

    Raises `PermpruneError` if they do not run here.
    """
    forced = kernels or os.environ.get(FORCED)
    library = None if forced == "torch" else load()
    if library is None:
        return None
    running = _running(library)
    for index, name in running:
        if forced in (None, name):
            return library, index
    choices = ", ".join([name for _, name in running] + ["torch"])
    raise PermpruneError(f"{FORCED} asks for kernels {forced!r}, which do not run here: choose {choices}")


class Traits(NamedTuple):
    """Of some kernels, their name, and whether they multiply pairs of bf16 numbers."""

    name: str
    pairs: bool


def best() -> Traits:
    """Return the traits of the kernels in use."""
    return _traits(require()[1])


def is_traced() -> bool:
    """Whether a graph is being made of what is computed: calls of the library would not be part of it."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


@cache
def _traits(index: int) -> Traits:
    library, _ = require()
    return Traits(dict(_running(library))[index], bool(library.permprune_runs_pairs(index)))


@cache
def runs_triton(device: str) -> bool:
    """Whether Triton kernels run on this type of device; the first time that a device has no kernels, a warning."""
    if device == "cuda" and find_spec("triton"):
        return True
    if device not in ("cpu", "meta"):
        advice = "install triton" if device == "cuda" else "move the model to the CPU or a CUDA GPU"
        message = f"permprune has no kernels for {device} here: PyTorch takes their place, slowly; {advice}"
        warnings.warn(message, stacklevel=3)
    return False


@cache
def load() -> ctypes.CDLL | None:
    """Load the library; returns None, with a warning, if it is missing, does not load, or is older than its sources."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
        _declare(library)
    except OSError as error:
        _warn(f"do not load ({error})")
        return None
    except AttributeError as error:  # a function is missing
        _warn(f"are older than this code ({error})")
        return None
    if library.permprune_sources().decode() != sources.digest(Path(__file__).parent):
        _warn("are older than their sources")
        return None
    if hasattr(library, "permprune_left_out") and library.permprune_left_out():  # see hatch_build.py
        _warn("were built on a machine without AVX-512, which this one has", instead="those of AVX2 take")
    library.permprune_use_threads_of(_parallel_region())
    return library


def _warn(reason: str, instead: str = "PyTorch takes") -> None:
    warnings.warn(
        f"permprune's native kernels {reason}: {instead} their place, slowly; install permprune again, or run "
        "hatch_build.py in a checkout",
        stacklevel=5,
    )


def _declare(library: ctypes.CDLL) -> None:
    """Declare the types of the library's functions. Raises `AttributeError` if it lacks one."""
    pointer, size, number, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_char_p
    real = ctypes.c_float
    declared: dict[str, tuple[Any, list[Any]]] = {
        "kernels": (text, [number]),
        "structure": (text, [number]),
        "runs_pairs": (number, [number]),
        "sources": (text, []),
        "use_threads_of": (None, [pointer]),
        "multiply": (number, [pointer, pointer, number, size, pointer, number, number]),
        "multiply_many": (number, [pointer, pointer, number, size, pointer, pointer, size, number, number]),
        "many_bytes": (size, [pointer, number, size, number, number]),
        "unpack": (number, [pointer, size, size, pointer, number, number, number]),
        "activate": (number, [pointer, pointer, size, real, real, *[number] * 4]),
        "normalize": (number, [*[pointer] * 3, size, size, real, real, number, number, number]),
        **dict.fromkeys(JOBS, (number, [pointer, number, number])),
    }
    for name, (result, arguments) in declared.items():
        function = getattr(library, f"permprune_{name}")
        function.restype, function.argtypes = result, arguments


def _texts(function: Any) -> Iterator[str]:
    """Yield what a function of the library returns for 0, 1, ... until it returns NULL."""
    for index in count():
        text: bytes | None = function(index)
        if text is None:
            return
        yield text.decode()


def _running(library: ctypes.CDLL) -> list[tuple[int, str]]:
    """Return index and name of the kernels that run on this processor, the best first."""
    return [(index, name) for index, name in enumerate(_texts(library.permprune_kernels)) if name]


@cache
def _structures() -> dict[str, type[ctypes.Structure]]:
    """Return the structures of the library by name; `types` are those of their members."""
    library, _ = require()
    made: dict[str, Any] = {}
    for text in _texts(library.permprune_structure):
        members: list[tuple[str, Any]] = []
        for kind, declared in re.findall(r"(?:const )?(?:struct )?(\w+) ([^;]+);", text.partition("{")[2]):
            for pointer, name, length in re.findall(r"(\*?)(\w+)(?:\[(\d+)\])?", declared):
                element = _pointer(kind) if pointer else made.get(kind) or _TYPES[kind]
                members.append((name, element * int(length) if length else element))
        name = text.partition(" ")[0]
        made[name] = type(name, (ctypes.Structure,), {"_fields_": members, "types": dict(members)})
    return made


@cache
def _pointer(kind: str) -> Any:
    """Return the type of a pointer to a C type."""
    return type("Pointer", (ctypes.c_void_p,), {"dtypes": _POINTED.get(kind)})


def _value(value: Any, kind: Any) -> Any:
    """Return what ctypes takes for a member of this type."""
    if value is None or isinstance(value, int | float):  # most are
        return value
    if isinstance(value, Tensor):
        if not value.is_cpu or (kind.dtypes and value.dtype not in kind.dtypes):
            raise TypeError(f"the native library does not read {value.dtype} on {value.device} here")
        return value.data_ptr()
    if isinstance(value, tuple):
        return tuple(_value(element, kind._type_) for element in value)
    return structure(kind.__name__, **value) if isinstance(value, dict) else value


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
