"""Compiles the C code of `permprune/kernels` into one library: as hatchling's build hook, or `python hatch_build.py`.

The compiler is `$CC` where it is set, else Zig's, which comes as a package (`ziglang`), so that no user needs one. Zig
links against an old C library, so that a wheel built on any Linux runs on every other. `PERMPRUNE_NATIVE=0`, and a
system for which there are no kernels, make a pure Python wheel: packed weights are then multiplied by PyTorch.
"""

from __future__ import annotations

import os
import platform
import runpy
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand
    BuildHookInterface = object

ROOT = Path(__file__).resolve().parent
FOLDER = Path("permprune/kernels")
# Zig's Clang spends a third of its time on debug information, which is stripped, unless it is told not to write any.
FLAGS = ["-std=gnu11", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden"]
CHECKS = ["-fno-sanitize=undefined", "-Wall", "-Wextra"]
MACHINES = {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vbmi2", "avx512_vnni"}
"""The features of a processor, in the words of Linux, without which the kernels of avx512*.c do not run."""

WITHOUT_AVX512 = """
#include "library.h"
#include "x86.h"
static int never(void) { return 0; }
const struct kernels amx_kernels = {.name = "amx", .runs_here = never};
const struct kernels avx512_kernels = {.name = "avx512", .runs_here = never};
EXPORT int32_t permprune_left_out(void) { return has_avx512(); }
"""
"""What a library has in place of those kernels: that it was built elsewhere is said where they would run."""

GLIBC = (2, 17)
MACOS = (11, 0)


class NativeKernels(BuildHookInterface):
    """Adds the library to wheels and editable installs, and names the platform it runs on.

    An editable install runs on this machine: kernels that its processor cannot run are not compiled.
    """

    def initialize(self, version: str, build_data: dict) -> None:
        if self.target_name != "wheel" or not supported():
            return
        library = build(without_avx512=version == "editable" and not has_avx512())
        build_data["artifacts"].append(str(library))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{wheel_platform()}"


def supported() -> bool:
    """Whether there are kernels for this system, and they are wanted."""
    wanted = os.environ.get("PERMPRUNE_NATIVE") != "0"
    return wanted and sys.platform in ("linux", "darwin") and platform.machine() in MACHINES


def has_avx512() -> bool:
    """Whether the kernels of avx512*.c may run on this machine; where the system does not tell, they may."""
    features = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not features.exists():
        return True
    return set(features.read_text(encoding="utf-8").split()) >= AVX512


def build(without_avx512: bool = False) -> Path:
    """Compile the library, and return its path below the root. Raises `SystemExit` when the compiler fails."""
    library = FOLDER / ("libpermprune.dylib" if sys.platform == "darwin" else "libpermprune.so")
    folder = ROOT / FOLDER
    sources = sorted(folder.rglob("*.c"))
    digest = runpy.run_path(str(folder / "sources.py"))["digest"](folder)
    defined = ["-I", str(folder), f'-DPERMPRUNE_SOURCES="{digest}"', *os.environ.get("CFLAGS", "").split()]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        if without_avx512:
            sources = [source for source in sources if not source.name.startswith("avx512")]
            sources.append(Path(scratch, "without_avx512.c"))
            sources[-1].write_text(WITHOUT_AVX512, encoding="utf-8")
        objects = [f"{scratch}/{number}.o" for number in range(len(sources))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Zig compiles the sources of one command in turn
            compiled = [
                pool.submit(run, [*FLAGS, *CHECKS, *defined, "-c", str(source), "-o", made], scratch)
                for source, made in zip(sources, objects, strict=True)
            ]
        for one in compiled:
            one.result()
        linked = f"{scratch}/{library.name}"
        strip = [] if os.environ.get("CC") else ["-s"]
        run([*FLAGS, *defined, *strip, "-shared", *objects, "-o", linked], scratch)
        Path(linked).replace(ROOT / library)
    return library


def run(arguments: list[str], scratch: str) -> None:
    """Run the compiler, whose files are in `scratch`. Raises `SystemExit` when it fails."""
    command = [*compiler(), *arguments]
    environment = {"ZIG_LOCAL_CACHE_DIR": scratch, "ZIG_GLOBAL_CACHE_DIR": scratch, **os.environ}
    if subprocess.run(command, env=environment, check=False).returncode:
        raise SystemExit(
            f"compiling permprune's kernels failed ({shlex.join(command)}): set CC to another compiler, or "
            "PERMPRUNE_NATIVE=0 to install without kernels"
        )


def compiler() -> list[str]:
    """The command of the compiler, with what it needs to know about the target."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    machine = MACHINES[platform.machine()]
    system = f"linux-gnu.{GLIBC[0]}.{GLIBC[1]}" if sys.platform == "linux" else f"macos.{MACOS[0]}.{MACOS[1]}"
    return [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-{system}"]


def wheel_platform() -> str:
    """The platform in a wheel's name: any Linux or macOS for Zig's library, this one for `$CC`'s."""
    machine = platform.machine()
    if sys.platform == "darwin":
        return f"macosx_{MACOS[0]}_{MACOS[1]}_{machine}"
    return f"linux_{machine}" if os.environ.get("CC") else f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}"


if __name__ == "__main__":
    print(build(without_avx512=not has_avx512()))
