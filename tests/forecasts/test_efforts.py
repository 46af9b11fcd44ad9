"""How much work an effort does: rounds, steps and windows, from shapes and data alone."""

import copy
import hashlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedModel

import permprune
from permprune import PermpruneError, PruneConfig
from permprune.config import DEFAULTS
from permprune.config import EFFORTS as NAMES
from permprune.engine.held import prepare
from permprune.forecasts import efforts
from permprune.forecasts.activations import Activations
from permprune.forecasts.efforts import EFFORTS, ROUNDS, STEPS, Effort, resolve
from permprune.permuters.registry import permuter
from permprune.permuters.trust_region import Newton

from ..cli.running import fails, run
from ..fixtures import make_tiny_llama
from ..modalities import make

WINDOWS = torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(1))
WEIGHT = "model.layers.0.mlp.up_proj.weight"


def chosen(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, windows: float, **settings: object) -> Newton:
    """The method of a run whose work is that of so many windows forward."""
    example = Activations(0, 0, 1, 0, operations=6e13 / windows)
    monkeypatch.setattr(efforts, "example_pass", lambda *_, **__: example)
    method = permuter(resolve(model, PruneConfig(**settings)).permute)  # type: ignore[arg-type]
    assert isinstance(method, Newton)
    return method


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Efforts that are done in a moment."""
    monkeypatch.setattr(efforts, "ROUNDS", (1, 1))
    yield


def test_a_model_that_does_not_run_without_numbers_has_the_work_of_its_weights(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("it reads a number")

    expected = resolve(tiny_llama, PruneConfig(effort="order", length=16))
    monkeypatch.setattr(efforts, "example_pass", fail)
    found = resolve(tiny_llama, PruneConfig(effort="order", length=16))
    assert found.permute == expected.permute
    assert "it reads a number" in caplog.text


def test_every_effort_has_a_budget() -> None:
    assert tuple(EFFORTS) == NAMES
    for name in ("seconds", "day"):
        with pytest.raises(PermpruneError, match=f"effort is '{name}': choose one of order, minutes, hour"):
            PruneConfig(effort=name)


def test_work_is_divided_into_rounds_and_steps(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round takes 8 windows forward and backward and 1.5 times 8 held-out ones, a step 2 and the dense model's.

    An update takes 32 windows twice. Half of many steps become twice as many of each block.
    """
    every = (720, 82, 0), (360, 37, 0), (36, STEPS[0], 0), (1300, 77, 154), (1e9, STEPS[1] // 2, STEPS[1])
    for windows, steps, of_blocks in every:
        method = chosen(tiny_llama, monkeypatch, windows, effort="minutes")
        assert (method.rounds, method.compensate) == (0, True)
        assert (method.block_steps, method.train_steps) == (of_blocks, steps)
    for windows, rounds in ((360, 10), (1, ROUNDS[0]), (1e9, ROUNDS[1])):
        method = chosen(tiny_llama, monkeypatch, windows, effort="order")
        assert (method.rounds, method.compensate, method.train_steps) == (rounds, False, 0)


def test_only_shapes_count(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EFFORTS, "minutes", Effort(1e10, trains=True))
    whole = resolve(tiny_llama, PruneConfig(length=32))
    shapes = copy.deepcopy(tiny_llama).to("meta")  # type: ignore[arg-type]
    assert resolve(shapes, PruneConfig(length=32)) == whole
    half = permuter(resolve(tiny_llama, PruneConfig(length=64)).permute)
    method = permuter(whole.permute)
    assert isinstance(half, Newton) and isinstance(method, Newton)
    assert method.train_steps == pytest.approx(2 * half.train_steps, rel=0.2) and STEPS[0] < half.train_steps


def test_prune_trains_unless_it_is_told_otherwise(tiny_llama: LlamaForCausalLM) -> None:
    default = resolve(tiny_llama, PruneConfig())
    assert default == resolve(tiny_llama, PruneConfig(effort="minutes")) and default.effort == "minutes"
    given = PruneConfig(permute="newton:rounds=3", samples=24)
    assert resolve(tiny_llama, given) == given
    assert resolve(tiny_llama, PruneConfig(samples=24)).samples == 24
    for both in (PruneConfig(effort="hour", permute="ria"), PruneConfig(effort="order").replace(permute="ria")):
        with pytest.raises(PermpruneError, match=r"effort .* chooses the search, and so does ria: give one of them"):
            resolve(tiny_llama, both)
    assert "give one of them" in fails("plan", "./no-model", "--effort", "hour", "--permute", "ria")
    assert {name: getattr(PruneConfig(), name) for name in DEFAULTS} == DEFAULTS
    assert pickle.loads(pickle.dumps(default)).given == {"permute", "samples"}
    with pytest.raises(PermpruneError, match="effort hour chooses the search of prune alone"):
        prepare(tiny_llama, None, PruneConfig(effort="hour"), examples=WINDOWS)


def test_windows_are_drawn_for_one_pass(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efforts, "example_pass", lambda *_, **__: Activations(0, 0, 1, 0, operations=1.0))
    config = PruneConfig(effort="hour")
    assert resolve(tiny_llama, config).samples == 24 + 8 + STEPS[1]  # half of the steps are of blocks
    assert resolve(make("bert"), config).samples == 24 + 8 + 2 * STEPS[1]
    for kind in ("vit", "whisper"):  # they take more memory
        assert resolve(make(kind), config).samples == 24 + 8 + 768


def test_training_sees_a_short_text_once(
    tiny_llama: LlamaForCausalLM, little: None, caplog: pytest.LogCaptureFixture
) -> None:
    pruned = permprune.prune(tiny_llama, examples=WINDOWS, precision="fp32")
    (said,) = [line for line in caplog.messages if "windows to train on" in line]
    assert "12 windows" in said and "each once, in 6 steps in place of 1000" in said
    assert (
        pruned.config.permute
        == pruned.record().settings["permute"]
        == "newton:start=ria:rounds=0:compensate=true:block_steps=12:train_steps=6"
    )
    assert pruned.solution.curve[-1].stage == "training" and "starts over" not in caplog.text


def test_training_sees_images_several_times(little: None, caplog: pytest.LogCaptureFixture) -> None:
    images = {"pixel_values": torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    pruned = permprune.prune(make("vit"), examples=images, precision="fp32")
    (said,) = [line for line in caplog.messages if "windows to train on" in line]
    assert "2 windows" in said and "up to 20 times, in 20 steps in place of" in said
    assert pruned.config.permute == "newton:start=ria:rounds=0:compensate=true:train_steps=20:rate=0.0005"
    assert "starts over" not in caplog.text


def test_an_effort_gives_the_same_files_every_time(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, little: None
) -> None:
    small = ["--calibration", tiny_text, "--data", tiny_text, "--length", "16", "--samples", "24", "--windows", "2"]
    digests = []
    for out, effort in (("one", []), ("other", ["--effort", "minutes"])):
        code, stdout, stderr = run("-v", "prune", tiny_checkpoint, *small, *effort, "--out", tmp_path / out)
        asked = "newton:start=ria:rounds=0:compensate=true:block_steps=2000:train_steps=1000on24"
        assert code == 0 and asked in "".join(stderr.split())
        method = "newton:start=ria:rounds=0:compensate=true:block_steps=12:train_steps=6"
        said = f"effort minutes: {method} on 24 windows; training changes the"
        assert stdout.startswith(said) and "; about" in stdout
        settings = json.loads((tmp_path / out / "permprune.json").read_text())["settings"]
        assert (settings["effort"], settings["permute"]) == ("minutes", method)
        assert "<dt>effort</dt><dd>minutes</dd>" in (tmp_path / out / "report.html").read_text()
        digests.append(hashlib.sha256((tmp_path / out / "model.safetensors").read_bytes()).digest())
    assert digests[0] == digests[1]
    code, _, stderr = run("prune", tiny_checkpoint, *small, "--effort", "order", "--out", tmp_path / "order")
    assert code == 0, stderr
    dense = make_tiny_llama().get_parameter(WEIGHT).data
    for out, unchanged in (("one", False), ("order", True)):
        weight = load_file(tmp_path / out / "model.safetensors")[WEIGHT]
        assert bool(torch.isin(weight[weight != 0], dense).all()) == unchanged
