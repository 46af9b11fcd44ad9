"""Checkpoints that come with Python code: it runs with --trust-remote-code, and never without."""

import builtins
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
from transformers import dynamic_module_utils

from permprune import PermpruneError, load, read_model
from permprune.checkpoints.io import UNTRUSTED
from permprune.checkpoints.offload import read_offloaded, read_skeleton
from permprune.checkpoints.weights import GATHERED
from permprune.cli import app

from ..cli.running import fails, run
from ..fixtures import make_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("retraced")]

TRUST = "--trust-remote-code"
SMALL = ("--samples", "6", "--length", "16", "--windows", "1", "--order", "ria")

CONFIGURATION = """
from transformers import LlamaConfig

class TinyConfig(LlamaConfig):
    model_type = "tiny-of-its-own"
"""

MODELING = """
from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_tiny import TinyConfig

Path({trace!r}).touch()

class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig

    def forward(self, input_ids=None, attention_mask=None, **options):
        output = super().forward(input_ids, attention_mask, **options)
        output.logits = 2 * output.logits
        return output
"""

TOKENIZATION = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path({trace!r}).touch()

class TinyTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of its own for the code that Transformers copies before it runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [*sys.path])
        yield


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr(builtins, "input", ask)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A file that is there once the code has run."""
    return tmp_path / "trace"


def give_code(folder: Path, trace: Path, file: str = "config.json", **values: object) -> None:
    code = {"configuration_tiny": CONFIGURATION, "modeling_tiny": MODELING, "tokenization_tiny": TOKENIZATION}
    for name, text in code.items():
        (folder / f"{name}.py").write_text(text.replace("{trace!r}", repr(str(trace))))
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))


MAP = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}


@pytest.fixture
def coded(tiny_checkpoint: Path, trace: Path) -> Path:
    """A checkpoint whose model Transformers does not have."""
    own = {"model_type": "tiny-of-its-own", "architectures": ["TinyForCausalLM"], "auto_map": MAP}
    give_code(tiny_checkpoint, trace, **own)
    return tiny_checkpoint


@pytest.fixture
def coded_class(tiny_checkpoint: Path, trace: Path) -> Path:
    """A checkpoint whose config Transformers knows, but not its class."""
    own = {"AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
    give_code(tiny_checkpoint, trace, architectures=["TinyForCausalLM"], auto_map=own)
    return tiny_checkpoint


@pytest.fixture
def coded_tokenizer(tiny_checkpoint: Path, trace: Path) -> Path:
    """A checkpoint whose tokenizer Transformers does not have."""
    own = {"AutoTokenizer": [None, "tokenization_tiny.TinyTokenizer"]}
    give_code(tiny_checkpoint, trace, "tokenizer_config.json", tokenizer_class="TinyTokenizer", auto_map=own)
    return tiny_checkpoint


def commands(folder: Path, text: Path) -> list[list[str | Path]]:
    data = ["--data", text]
    calibrated = ["--calibration", text, *data, *SMALL[:6]]
    return [
        ["prune", folder, "--out", folder.with_name("held"), *calibrated],
        ["prune", folder, "--out", folder.with_name("read"), "--order", "ria", "--set", "offload=disk", *calibrated],
        ["compare", folder, "--out", folder.with_name("swept"), "--methods", "none", "--patterns", "2:4", *calibrated],
        ["inspect", folder],
        ["evaluate", folder, *data, "--windows", "1", "--length", "16"],
        ["finetune", folder, "--out", folder.with_name("tuned"), *data, "--length", "16"],
    ]


@pytest.mark.parametrize("kind", ["coded", "coded_class", "coded_tokenizer"])
def test_without_consent_no_command_runs_code_or_asks(
    kind: str, trace: Path, tiny_text: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    for command in commands(folder, tiny_text):
        code, _, stderr = run(*command)
        assert code == 2 and stderr.splitlines()[-1] == f"permprune: {folder} does not load: {UNTRUSTED}"
    for read in (read_model, read_skeleton, lambda name: read_offloaded(name, trace.with_name("offloaded"))):
        if kind != "coded_tokenizer" or read is not read_skeleton:
            with pytest.raises(PermpruneError, match="--trust-remote-code"):
                read(str(folder))
    assert not trace.exists()
    assert not any(folder.with_name(out).exists() for out in ("held", "read", "swept", "probed", "tuned"))


@pytest.mark.parametrize("mode", [("--mode", "fold"), ("--mode", "gather"), ("--set", "offload=disk")])
def test_with_consent_a_model_of_its_own_code_is_pruned_and_written_with_the_code(
    mode: tuple[str, str], coded: Path, trace: Path, tiny_text: Path, tmp_path: Path
) -> None:
    out, data = tmp_path / "out", ("--data", tiny_text, "--windows", "1")
    code, _, stderr = run("prune", coded, "--out", out, "--calibration", tiny_text, *data, *SMALL, *mode, TRUST)
    assert code == 0, stderr
    assert trace.exists()
    assert (out / GATHERED).exists() == ("gather" in mode)
    assert {"configuration_tiny.py", "modeling_tiny.py"} <= {path.name for path in out.iterdir()}
    assert json.loads((out / "config.json").read_text())["auto_map"] == MAP

    trace.unlink()
    line = f"permprune: {out} does not load: {UNTRUSTED}"
    assert fails("verify", out) == fails("evaluate", out, *data) == line and not trace.exists()
    assert run("verify", out, TRUST)[0] == run("evaluate", out, *data, "--length", "16", TRUST)[0] == 0
    model = load(out, trust_remote_code=True)
    assert type(model).__name__ == "TinyForCausalLM" and not type(model).__module__.startswith("transformers.")
    if GATHERED not in {path.name for path in out.iterdir()}:
        again = tf.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
        assert type(again).__name__ == "TinyForCausalLM"


@pytest.mark.parametrize("kind", ["coded", "coded_class"])
def test_with_consent_the_class_is_the_checkpoint_s(kind: str, request: pytest.FixtureRequest) -> None:
    model, tokenizer, _ = read_model(str(request.getfixturevalue(kind)), trust_remote_code=True)
    assert isinstance(tokenizer, tf.PreTrainedTokenizerBase)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, 2 * make_tiny_llama()(tokens).logits)


def test_with_consent_a_tokenizer_s_code_runs(coded_tokenizer: Path, trace: Path) -> None:
    tokenizer = read_model(str(coded_tokenizer), trust_remote_code=True)[1]
    assert type(tokenizer).__name__ == "TinyTokenizer" and trace.exists()


def test_code_that_is_not_needed_does_not_run(tiny_checkpoint: Path, trace: Path) -> None:
    give_code(tiny_checkpoint, trace, auto_map=MAP)
    assert type(read_model(str(tiny_checkpoint))[0]) is tf.LlamaForCausalLM and not trace.exists()


@pytest.mark.parametrize("command", ["compare", "inspect"])
def test_with_consent_other_commands_run_on_such_a_model(command: str, coded: Path, tiny_text: Path) -> None:
    (line,) = [line for line in commands(coded, tiny_text) if line[0] == command]
    code, _, stderr = run(*line, TRUST)
    assert code == 0, stderr


def test_with_consent_such_a_model_is_packed_and_unpacked(coded: Path, tiny_text: Path, tmp_path: Path) -> None:
    held, packed, again, at_once = (tmp_path / name for name in ("held", "packed", "again", "at-once"))
    pruned = [*commands(coded, tiny_text)[0], "--order", "none", TRUST]
    assert run(*pruned)[0] == run(*pruned, "--pack", "fp32", "--out", at_once)[0] == 0
    for command in (("pack", held, "--dtype", "fp32", "--out", packed), ("unpack", packed, "--out", again)):
        assert fails(*command) == f"permprune: {command[1]} does not load: {UNTRUSTED}"
        assert run(*command, TRUST)[0] == 0
    assert run("verify", again, TRUST)[0] == run("verify", at_once, TRUST)[0] == 0


def test_every_command_that_reads_a_model_takes_the_consent() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        if command.callback.__name__ in ("fetch", "methods", "push"):  # they read no model
            continue
        assert "trust_remote_code" in inspect.signature(command.callback).parameters, command.callback.__name__
