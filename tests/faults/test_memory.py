"""Memory that runs out: one line, with the peak so far and the options that help."""

import pickle
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaMLP

import permprune
from permprune.checkpoints.io import load_written
from permprune.coupling.trace import Untraceable
from permprune.permuters.registry import PERMUTERS
from permprune.plan import plan_run
from permprune.system.failures import OutOfMemory
from permprune.system.files import WriteError

from ..cli.running import fails, run
from ..forked import forked

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("retraced")]

WINDOWS = torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(1))
SMALL = ["--length", "16", "--samples", "24", "--windows", "4"]


try:
    torch.empty(2**47, dtype=torch.uint8)
except RuntimeError as error:
    TORCH_SAYS = str(error)


def python_has_none(*_: object, **__: object) -> None:
    raise MemoryError


def torch_has_none(*_: object, **__: object) -> None:
    raise RuntimeError(TORCH_SAYS)


def the_gpu_has_none(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def the_system_has_none(*_: object, **__: object) -> None:
    raise OSError(12, "Cannot allocate memory")


ENDS = [python_has_none, torch_has_none, the_gpu_has_none, the_system_has_none]


@pytest.mark.parametrize("mode", ["fold", "gather"])
@pytest.mark.parametrize("end", ENDS)
def test_tracing_says_so(
    tiny_llama: LlamaForCausalLM, mode: str, end: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", end)
    with pytest.raises(OutOfMemory, match=r"^out of memory \(peak so far: [\d,]+ MiB\): give .*--set recompute=true"):
        permprune.prune(tiny_llama, order="none", examples=WINDOWS, mode=mode)


@pytest.mark.parametrize("end", ENDS)
def test_calibration_says_so(
    tiny_llama: LlamaForCausalLM, end: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass that is traced has enough, a later one has not."""
    plan = plan_run

    def planned(*arguments: object, **options: object) -> object:
        found = plan(*arguments, **options)
        monkeypatch.setattr(LlamaMLP, "forward", end)
        return found

    monkeypatch.setattr("permprune.engine.held.plan_run", planned)
    with pytest.raises(OutOfMemory):
        permprune.prune(tiny_llama, order="none", examples=WINDOWS)


@pytest.mark.parametrize("end", ENDS)
def test_loading_and_evaluating_say_so(
    tiny_checkpoint: Path, end: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "from_pretrained", end)
        with pytest.raises(OutOfMemory):
            permprune.read_model(str(tiny_checkpoint))
    model, _, _ = permprune.read_model(str(tiny_checkpoint))
    monkeypatch.setattr(LlamaMLP, "forward", end)
    with pytest.raises(OutOfMemory):
        permprune.evaluate_model(model, permprune.Examples.of(WINDOWS))


def test_a_command_names_the_options_it_has(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["--data", tiny_text, "--windows", "4", "--length", "16"]
    source = [tiny_checkpoint, "--calibration", tiny_text, *data, "--samples", "24"]
    pruned = tmp_path / "pruned"
    assert run("prune", *source, "--order", "none", "--out", pruned)[0] == 0
    monkeypatch.setattr(LlamaMLP, "forward", torch_has_none)
    said = fails("prune", *source, "--order", "none", "--out", tmp_path / "out")
    assert "out of memory" in said and "--set batch=1" in said and "recompute=true" in said and "--memory 8GiB" in said
    assert "--set batch=1" in fails("compare", *source, "--methods", "ria")
    said = fails("evaluate", tiny_checkpoint, *data)
    assert "--length" in said and "--windows" in said and "--batch" not in said
    assert "use a machine with more memory" in fails("verify", pruned)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("owner", "name"), [(LlamaForCausalLM, "from_pretrained"), (LlamaMLP, "forward")])
def test_the_last_check_costs_no_search(
    owner: type, name: str, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In which the written model is loaded beside the one in memory, and run."""
    command = ["prune", tiny_checkpoint, "--calibration", tiny_text, "--data", tiny_text, *SMALL, "--order", "ria"]
    command += ["--out", tmp_path / "out"]
    with monkeypatch.context() as patch:

        def loaded(*arguments: Any) -> Any:
            patch.setattr(owner, name, torch_has_none)
            return load_written(*arguments)

        patch.setattr("permprune.engine.held.load_written", loaded)
        code, _, stderr = run(*command)
    assert code == 2 and "out of memory" in stderr.splitlines()[-1] and not (tmp_path / "out").exists()
    monkeypatch.setattr(PERMUTERS["ria"], "order", lambda *_: pytest.fail("searched again"))
    assert run(*command, "--resume")[0] == 0


def test_other_errors_stay_what_they_are(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("the shapes differ")

    monkeypatch.setattr(LlamaMLP, "forward", broken)
    with pytest.raises(permprune.PermpruneError, match="cannot trace the model") as caught:
        permprune.prune(tiny_llama, order="none", examples=WINDOWS)
    assert not isinstance(caught.value, OutOfMemory)


def limited(*command: str | Path) -> list[tuple[int, str, str]]:
    """What a command says in this process, which gets little more memory than it has, and then some more."""
    found = []
    for megabytes in (30, 150):
        size = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
        assert size
        resource.setrlimit(resource.RLIMIT_AS, (1024 * int(size[1]) + megabytes * 2**20, resource.RLIM_INFINITY))
        found.append(run(*command))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited and read as Linux does it")
def test_a_process_that_gets_no_more_memory_says_so(
    tiny_tokenizer: PreTrainedTokenizerFast, tiny_text: Path, tmp_path: Path
) -> None:
    """At first there is not enough for 50 MB of weights, then for them and activations."""
    large = LlamaConfig(vocab_size=128, hidden_size=512, intermediate_size=1024, num_hidden_layers=8)
    LlamaForCausalLM(large).save_pretrained(tmp_path / "large")
    tiny_tokenizer.save_pretrained(tmp_path / "large")
    command = ["evaluate", tmp_path / "large", "--data", tiny_text, "--length", "1024", "--windows", "4"]
    status, found = forked(limited, *command)
    assert status == 0 and [code for code, _, _ in found] == [2, 2], found
    assert all(stderr.startswith("permprune: out of memory (peak") for _, _, stderr in found), found


@pytest.mark.parametrize(
    "error",
    [
        permprune.PermpruneError("a line"),
        OutOfMemory(1234.5, ["batch"]),
        Untraceable("cannot trace the model"),
        WriteError(Path("out"), "no space", "free some"),
    ],
)
def test_processes_of_a_comparison_hand_errors_on(error: permprune.PermpruneError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)
