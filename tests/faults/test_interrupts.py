"""Ctrl-C or SIGTERM at any time: a status of 130 or 143 and a line, never a traceback."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from subprocess import PIPE

import pytest
from transformers import PreTrainedTokenizerBase

from permprune.system.failures import leaving_on_interrupt
from permprune.system.files import WorkFolder

from .pruned import options, write_source

pytestmark = pytest.mark.slow

SCRIPT = "import sys\nfrom permprune.__main__ import main\nsys.exit(main())\n"
"""What pip writes for the program."""


@pytest.mark.parametrize(
    ("number", "started", "reached"),
    [
        (signal.SIGINT, "module", "torch"),
        (signal.SIGINT, "script", "permprune.cli.common"),
        (signal.SIGTERM, "module", "torch"),
    ],
)
def test_signals_while_the_program_is_imported(number: int, started: str, reached: str, tmp_path: Path) -> None:
    script = tmp_path / "permprune"
    script.write_text(SCRIPT)
    (tmp_path / "config.json").write_text("{}")  # so that the model is not refused before torch is imported
    program = ["-m", "permprune"] if started == "module" else [str(script)]
    command = [sys.executable, "-X", "importtime", *program, "evaluate", str(tmp_path)]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell runs in the background ignores it
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, preexec_fn=heard) as process:
        assert process.stdout is not None and process.stderr is not None
        lines = iter(process.stderr)
        assert any(line.rsplit("|")[-1].strip() == reached for line in lines), "a line for each module imported"
        process.send_signal(number)
        said = [line.strip() for line in lines if not line.startswith("import time:")]
        assert process.stdout.read() == ""
    assert (process.returncode, said) == (128 + number, ["permprune: interrupted"])


def test_sigterm_while_the_program_works(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    source, out = write_source(tmp_path / "dense", tiny_tokenizer), tmp_path / "pruned"
    command = [sys.executable, "-m", "permprune", "prune", str(source), *options(source), "--out", str(out)]
    with subprocess.Popen([*command, "--order", "newton:rounds=10000"], stderr=PIPE, text=True) as process:
        assert process.stderr is not None
        while not WorkFolder(out).holds_state() and process.poll() is None:
            time.sleep(0.05)
        process.terminate()
        said = process.stderr.read().splitlines()
    line = "permprune: interrupted; repeat the command with --resume to continue"
    assert (process.returncode, said[-1]) == (143, line)
    assert not out.exists()


FORKED = """
import os, signal, time
from permprune.system.failures import interruptible, leaving_on_interrupt
ready, started = os.pipe()
with leaving_on_interrupt(), interruptible():
    child = os.fork()
    if not child:
        os.write(started, b".")
        time.sleep(60)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_sigterm_ends_forked_children_without_a_word() -> None:
    ended = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=50)
    assert (ended.stdout.strip(), ended.stderr) == (str(-signal.SIGTERM), "")


def test_under_torchrun_sigterm_ends_a_process_as_before() -> None:
    code = "from permprune.system.failures import INTERRUPTS; print(*map(int, INTERRUPTS))"
    joined = {**os.environ, "TORCHELASTIC_RUN_ID": "none"}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=joined)
    assert said.stdout.strip() == str(int(signal.SIGINT))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ignored_signal_stays_ignored(number: int) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with leaving_on_interrupt():
            assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
