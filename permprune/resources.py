"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def reset_peak_memory() -> None:
    """Start a new peak, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # elsewhere peaks are those since the process began


def peak_memory_mb() -> float:
    """The largest resident memory since the last reset, in MiB."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 1024)
