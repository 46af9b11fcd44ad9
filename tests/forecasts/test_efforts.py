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
from permprune.config import EFFORTS as NAMES
from permprune.config import PARTS
from permprune.engine.held import prepare
from permprune.forecasts import efforts
from permprune.forecasts.activations import Activations
from permprune.forecasts.efforts import EFFORTS, ROUNDS, STEPS, Effort, resolve
from permprune.permuters.kept import RIAPermuter
from permprune.permuters.trust_region import Newton
from permprune.recipe import Recipe
from permprune.training.train import Training
from permprune.updates.methods import ADMM, NoUpdate

from ..cli.running import fails, run
from ..fixtures import make_tiny_llama
from ..modalities import make

WINDOWS = torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(1))
WEIGHT = "model.layers.0.mlp.up_proj.weight"


def chosen(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, windows: float, **settings: object) -> Recipe:
    """The recipe of a run whose work is that of so many windows forward."""
    example = Activations(0, 0, 1, 0, operations=6e13 / windows)
    monkeypatch.setattr(efforts, "example_pass", lambda *_, **__: example)
    return resolve(model, PruneConfig(**settings)).recipe  # type: ignore[arg-type]


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
    assert found.order == expected.order
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
        recipe = chosen(tiny_llama, monkeypatch, windows, effort="minutes")
        assert (recipe.order, recipe.update) == (RIAPermuter(), ADMM())
        assert (recipe.train.block_steps, recipe.train.steps) == (of_blocks, steps)
    for windows, rounds in ((360, 10), (1, ROUNDS[0]), (1e9, ROUNDS[1])):
        recipe = chosen(tiny_llama, monkeypatch, windows, effort="order")
        assert recipe == Recipe(Newton(rounds=rounds), NoUpdate(), Training())


def test_only_shapes_count(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EFFORTS, "minutes", Effort(1e10, trains=True))
    whole = resolve(tiny_llama, PruneConfig(length=32))
    shapes = copy.deepcopy(tiny_llama).to("meta")  # type: ignore[arg-type]
    assert resolve(shapes, PruneConfig(length=32)) == whole
    half, steps = resolve(tiny_llama, PruneConfig(length=64)).recipe.train.steps, whole.recipe.train.steps
    assert steps == pytest.approx(2 * half, rel=0.2) and STEPS[0] < half


def test_prune_trains_unless_it_is_told_otherwise(tiny_llama: LlamaForCausalLM) -> None:
    default = resolve(tiny_llama, PruneConfig())
    assert default == resolve(tiny_llama, PruneConfig(effort="minutes")) and default.effort == "minutes"
    given = PruneConfig(order="newton:rounds=3", samples=24)
    assert resolve(tiny_llama, given) == given.replace(update="none", train="none") == given.completed()
    assert resolve(tiny_llama, PruneConfig(samples=24)).samples == 24
    assert given.replace(samples=None).completed().samples == 192
    for part, value in (("order", "ria"), ("update", "admm"), ("train", "steps=9")):
        with pytest.raises(PermpruneError, match=f"effort hour sets order, update and training: leave out {part}, or"):
            resolve(tiny_llama, PruneConfig(effort="hour").replace(**{part: value}))  # type: ignore[arg-type]
        assert f"leave out {part}" in fails("plan", "./no-model", "--effort", "hour", f"--{part}", value)
    assert pickle.loads(pickle.dumps(default)) == default
    with pytest.raises(PermpruneError, match="effort hour sets the recipe of prune alone"):
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
    settings = pruned.record().settings
    assert [settings[part] for part in PARTS] == ["ria", "admm", "steps=6:blocks=true"]
    assert pruned.solution.curve[-1].stage == "training" and "starts over" not in caplog.text


def test_training_sees_images_several_times(little: None, caplog: pytest.LogCaptureFixture) -> None:
    images = {"pixel_values": torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    pruned = permprune.prune(make("vit"), examples=images, precision="fp32")
    (said,) = [line for line in caplog.messages if "windows to train on" in line]
    assert "2 windows" in said and "up to 20 times, in 20 steps in place of" in said
    assert pruned.config.train == "steps=20:rate=0.0005"
    assert "starts over" not in caplog.text


def test_an_effort_gives_the_same_files_every_time(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, little: None
) -> None:
    small = ["--calibration", tiny_text, "--data", tiny_text, "--length", "16", "--samples", "24", "--windows", "2"]
    digests = []
    for out, effort in (("one", []), ("other", ["--effort", "minutes"])):
        code, stdout, stderr = run("-v", "prune", tiny_checkpoint, *small, *effort, "--out", tmp_path / out)
        assert code == 0 and "order: ria; update: admm; train: 1000 steps, blocks first; 24" in " ".join(stderr.split())
        recipe = "order: ria\nupdate: admm\ntrain: 6 steps, blocks first\n"
        assert stdout.startswith(f"{recipe}effort minutes, 24 windows; training changes the") and "; about" in stdout
        settings = json.loads((tmp_path / out / "permprune.json").read_text())["settings"]
        assert [settings[name] for name in ("effort", *PARTS)] == ["minutes", "ria", "admm", "steps=6:blocks=true"]
        assert "<dt>effort</dt><dd>minutes</dd>" in (tmp_path / out / "report.html").read_text()
        digests.append(hashlib.sha256((tmp_path / out / "model.safetensors").read_bytes()).digest())
    assert digests[0] == digests[1]
    code, _, stderr = run("prune", tiny_checkpoint, *small, "--effort", "order", "--out", tmp_path / "order")
    assert code == 0, stderr
    dense = make_tiny_llama().get_parameter(WEIGHT).data
    for out, unchanged in (("one", False), ("order", True)):
        weight = load_file(tmp_path / out / "model.safetensors")[WEIGHT]
        assert bool(torch.isin(weight[weight != 0], dense).all()) == unchanged
