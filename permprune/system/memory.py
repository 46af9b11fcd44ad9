"""Where models run, and the peak memory of this process."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil

M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
"""Options of glibc's `mallopt`."""


def reset_peak_memory() -> None:
    """Start a new peak, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # elsewhere peaks are those since the process began


def peak_memory_mb() -> float | None:
    """The largest resident memory since the last reset, in MiB; None where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        pass  # not Linux
    try:
        import resource
    except ImportError:  # Windows, whose own count psutil reads
        peak: int | None = getattr(psutil.Process().memory_info(), "peak_wset", None)
        return None if peak is None else peak / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def keep_freed_memory() -> None:
    """Let this process reuse memory it has freed instead of giving it back, where the C library is GNU's.

    By default every large tensor is mapped anew, and the system clears its pages each time it is written to; without
    that a gradient takes a third less time on a CPU. `mallopt`'s M_MMAP_MAX and M_TRIM_THRESHOLD: see its manual page.
    """
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
        _call_libc("mallopt", option, value)


def release_freed_memory() -> None:
    """Give back now what `keep_freed_memory` has kept: what the next work needs may have other sizes, or threads."""
    _call_libc("malloc_trim", 0)


def _call_libc(name: str, *arguments: int) -> None:
    """Call a function of the C library, if it has one of that name."""
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return
    function(*arguments)
