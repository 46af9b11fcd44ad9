"""Ctrl-C at any time: a status of 130 and a line, never a traceback."""

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from subprocess import PIPE

import pytest

from permprune.system.failures import leaving_on_interrupt

pytestmark = pytest.mark.slow

SCRIPT = "import sys\nfrom permprune.__main__ import main\nsys.exit(main())\n"
"""What pip writes for the program."""


@pytest.mark.parametrize(("started", "reached"), [("module", "torch"), ("script", "permprune.cli.common")])
def test_ctrl_c_while_the_program_is_imported(started: str, reached: str, tmp_path: Path) -> None:
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
        process.send_signal(signal.SIGINT)
        said = [line.strip() for line in lines if not line.startswith("import time:")]
        assert process.stdout.read() == ""
    assert (process.returncode, said) == (130, ["permprune: interrupted"])


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with leaving_on_interrupt():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
