"""Where models run, and the peak memory of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch
from torch import nn


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_device(model: nn.Module) -> torch.device:
    """Where a model runs: where its weights lie, or the best device where they are read layer by layer."""
    device = next(model.parameters()).device
    return best_device() if device.type == "meta" else device


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
