"""Memory that a process has freed."""

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from permprune.system.memory import keep_freed_memory, release_freed_memory


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries give memory back themselves")
def test_freed_memory_is_kept_until_it_is_released() -> None:
    keep_freed_memory()
    tensors = [torch.ones(2**18) for _ in range(200)]
    last = tensors[-1]  # memory below it does not end the heap
    full = resident()
    del tensors
    assert resident() > full - 50 * 2**20
    release_freed_memory()
    # not all of the 200 MiB: earlier tests leave pages behind that what still lives shares
    assert resident() < full - 100 * 2**20 and bool(last.eq(1).all())


KEPT = """
import resource
import subprocess
import sys
from permprune.system.memory import keep_activations
import torch

def faults(size):
    torch.empty(size, dtype=torch.uint8).fill_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.empty(size, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_activations()
print(faults(2**24), faults(2**27))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries give memory back themselves")
def test_activations_are_kept_and_larger_tensors_are_not() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    kept, given_back = map(int, done.stdout.split())
    assert kept < 100 and given_back > 8 * 100
