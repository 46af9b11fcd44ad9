"""What a person sees at a terminal while a command works."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from threading import Thread

import pytest
from rich.console import Console

from permprune.system import progress
from permprune.system.progress import log

from .running import COMMAND, run

CONTROLS = re.compile(r"\x1b\[[?\d;]*[A-Za-z]")
SMALL = ["--length", "16", "--samples", "24", "--windows", "4"]


@contextmanager
def terminal() -> Iterator[tuple[int, list[str]]]:
    """A pseudo-terminal: the file descriptor to write to, and what was written, complete at the end."""
    reader, writer = os.openpty()
    seen: list[str] = []

    def read() -> None:
        try:
            while text := os.read(reader, 2**16):
                seen.append(text.decode())
        except OSError:  # the end, on Linux
            pass

    thread = Thread(target=read, daemon=True)
    thread.start()
    try:
        yield writer, seen
    finally:
        os.close(writer)
        thread.join(60)
        os.close(reader)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(progress, "console", Console(stderr=True, force_interactive=True))


def on_terminal(*arguments: str | Path) -> str:
    """What a command writes to a terminal, without the control characters."""
    with (
        terminal() as (writer, seen),
        open(writer, "w", closefd=False) as screen,
        redirect_stdout(screen),
        redirect_stderr(screen),
        pytest.raises(SystemExit),
    ):
        COMMAND.main([str(argument) for argument in arguments], prog_name="permprune")
    return CONTROLS.sub("", "".join(seen))


@pytest.mark.slow
def test_a_run_shows_its_stages_and_then_its_result(
    shown: None, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    data = ["--calibration", tiny_text, "--data", tiny_text, *SMALL]
    method = ["--order", "newton:rounds=1", "--update", "sparsegpt"]
    text = on_terminal("prune", tiny_checkpoint, *data, *method, "--pack", "bf16", "--out", tmp_path / "out")
    stages = ["read the model", "calibrate", "measure the dense model", "measure the natural order"]
    stages += ["newton, start", "newton, rounds", "update the weights", "measure"]
    stages += ["write", "pack", "measure the speed"]
    at = [text.index(f"stage {number} of {len(stages)}: {name}; ") for number, name in enumerate(stages, 1)]
    assert at == sorted(at)
    assert "so far" not in text[at[-1] :].rpartition("\nwritten to")[2]


def test_without_a_terminal_stages_are_lines_of_the_log(tiny_checkpoint: Path, tiny_text: Path) -> None:
    level = log.level
    try:
        asked = ["evaluate", tiny_checkpoint, "--data", tiny_text, "--length", "16", "--windows", "2"]
        assert run(*asked)[2] == ""
        said = run("--verbose", *asked)[2]
    finally:
        log.setLevel(level)
    assert "importing PyTorch" in said
    assert "stage 1 of 2: read the model" in said and "stage 2 of 2: measure" in said and "so far" not in said


def test_a_line_is_shown_before_torch_is_imported_and_ctrl_c_erases_it(shown: None, tiny_checkpoint: Path) -> None:
    with terminal() as (writer, seen):
        command = [sys.executable, "-m", "permprune", "evaluate", str(tiny_checkpoint)]
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell runs in the background ignores it
        process = subprocess.Popen(command, stdout=writer, stderr=writer, preexec_fn=heard)
        while "importing PyTorch" not in "".join(seen) and process.poll() is None:
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    before, _, after = "".join(seen).rpartition("permprune: interrupted")
    assert "evaluate: importing PyTorch" in before
    assert before.endswith("\x1b[2K\x1b[?25h") and not after.strip()  # no text is left on the line; the cursor is back
