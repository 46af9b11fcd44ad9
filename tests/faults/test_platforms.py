"""Systems that lack what Linux has."""

import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from permprune.system import memory as resources
from permprune.system.memory import peak_memory_mb, reset_peak_memory

from ..cli.running import run


@pytest.fixture
def no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux's own files are not there."""

    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(resources, "Path", lambda _: SimpleNamespace(read_text=missing, write_text=missing))


@pytest.mark.usefixtures("no_proc")
def test_peaks_come_from_what_the_system_has(monkeypatch: pytest.MonkeyPatch) -> None:
    reset_peak_memory()
    assert (peak_memory_mb() or 0) > 100, "those of POSIX"
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory_mb() is None, "psutil knows no peak of this system"
    windows = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=3 * 2**20))
    monkeypatch.setattr(psutil, "Process", lambda: windows)
    assert peak_memory_mb() == 3.0


@pytest.mark.slow
@pytest.mark.usefixtures("no_proc")
def test_an_unknown_peak_is_a_dash(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    small = ["--calibration", tiny_text, "--data", tiny_text, "--length", "16", "--samples", "24", "--windows", "4"]
    assert run("prune", tiny_checkpoint, *small, "--order", "random", "--out", tmp_path / "out")[0] == 0
    assert '"peak_memory_mb": null' in (tmp_path / "out" / "permprune.json").read_text()
    options = ["--patterns", "2:4", "--methods", "random", "--out", tmp_path / "compared"]
    code, stdout, stderr = run("compare", tiny_checkpoint, *small, *options)
    assert code == 0 and "\N{EN DASH} │" in stdout, stderr
