"""What an interrupted run goes on from: its own state, never that of another model, text or version, or of two runs."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from permprune.config import PruneConfig
from permprune.engine.held import Prepared, prepare
from permprune.engine.session import Session
from permprune.permuters.base import Permuter, Random
from permprune.permuters.registry import PERMUTERS
from permprune.permuters.trust_region import Newton
from permprune.system import search_state as checkpoint
from permprune.system.files import WorkFolder
from permprune.system.search_state import Checkpoint
from permprune.training.kept_weights import KeptWeights
from permprune.training.loop import Trainer

from ..cli.running import fails, run
from ..conversations import write_answers

pytestmark = pytest.mark.slow

SMALL = ["--length", "16", "--samples", "24", "--windows", "4"]
TEXTS = ["two of every four weights are kept", "the order of the channels decides", "a few small windows"]


def write_text(path: Path, words: str) -> Path:
    path.write_text("\n".join([words, *TEXTS] * 60), encoding="utf-8")
    return path


@pytest.fixture
def source(tiny_checkpoint: Path, tmp_path: Path) -> list[str]:
    calibration, data = (write_text(tmp_path / f"{name}.txt", name) for name in ("calibration", "evaluation"))
    return [str(tiny_checkpoint), "--calibration", str(calibration), "--data", str(data), *SMALL]


def stop(*_: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def interrupted(owner: type, name: str, before: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, the call of a method raises KeyboardInterrupt after so many have been made."""
    original, calls = getattr(owner, name), []

    def interrupt(*args: Any, **options: Any) -> Any:
        if len(calls) == before:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*args, **options)

    with patch.context() as inside:
        inside.setattr(owner, name, interrupt)
        yield


@contextmanager
def counted(owner: type, name: str, patch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Inside, a list that has an element for every call of a method."""
    original, calls = getattr(owner, name), list[int]()

    def count(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return original(*args, **options)

    with patch.context() as inside:
        inside.setattr(owner, name, count)
        yield calls


def other_weights(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(1.01)
    model.save_pretrained(folder)


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))


def other_text(folder: Path, name: str) -> None:
    write_text(folder.parent / f"{name}.txt", "other words")


CHANGES: dict[str, Callable[[Path], None]] = {
    "model weights": other_weights,
    "model config": other_config,
    "calibration examples": lambda folder: other_text(folder, "calibration"),
    "evaluation examples": lambda folder: other_text(folder, "evaluation"),
}


@contextmanager
def changed(what: str, folder: Path) -> Iterator[None]:
    """Inside, what a run reads has other contents under the same names."""
    paths = [folder / "config.json", folder / "model.safetensors", *folder.parent.glob("*.txt")]
    before = {path: path.read_bytes() for path in paths}
    CHANGES[what](folder)
    yield
    for path, content in before.items():
        path.write_bytes(content)


@pytest.mark.parametrize("place", ["none", "disk"])
def test_the_state_of_another_search_is_refused(
    source: list[str], tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["prune", *source, "--out", tmp_path / "out", "--order", "ria", "--set", f"offload={place}"]
    with interrupted(PERMUTERS["ria"], "order", 2, monkeypatch):
        assert run(*command)[0] == 130
    for what in ("model weights", "model config", "calibration examples"):
        with changed(what, Path(source[0])):
            code, _, stderr = run(*command, "--resume")
        assert code == 2 and f"was saved with another {what}: use the same, or remove" in stderr.splitlines()[-1]
    monkeypatch.setattr("permprune.plan.versions", lambda: {"torch version": "1.0", "permprune version": "0"})
    assert "another permprune version, torch version, transformers version" in run(*command, "--resume")[2]
    assert "continue with --resume, or remove it" in fails(*command)


@pytest.mark.parametrize("cut", [False, True], ids=["other bytes", "cut off"])
def test_a_checkpoint_that_changes_during_a_run_is_named(
    source: list[str], tmp_path: Path, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["prune", *source, "--out", tmp_path / "out", "--order", "ria", "--set", "offload=disk"]
    weights = Path(source[0]) / "model.safetensors"
    whole, order, calls = weights.read_bytes(), PERMUTERS["ria"].order, []

    def change(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            weights.write_bytes(whole[: len(whole) // 2] if cut else bytes(byte ^ 1 for byte in whole))
        return order(*args)

    with monkeypatch.context() as patch:
        patch.setattr(PERMUTERS["ria"], "order", change)
        code, _, stderr = run(*command)
    assert code == 2 and "model.safetensors changed during the run: restore it" in stderr.splitlines()[-1]
    weights.write_bytes(whole)
    assert run(*command, "--resume")[0] == 0


@pytest.mark.parametrize("done", [False, True], ids=["part", "all"])
def test_the_cells_of_another_comparison_are_refused(
    source: list[str], tmp_path: Path, done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compare", *source, "--out", tmp_path / "out", "--patterns", "2:4", "--methods", "random"]
    with monkeypatch.context() as patch, interrupted(Session, "attempt", 2 if done else 1, patch):
        patch.setattr("permprune.report.comparison.comparison_table", stop)
        assert run(*command)[0] == 130
    with counted(Session, "attempt", monkeypatch) as runs:
        for what in CHANGES:
            with changed(what, Path(source[0])):
                assert f"was saved with another {what}: use the same, or remove" in fails(*command, "--resume")
    assert not runs
    assert run(*command, "--memory", "8GiB", "--resume")[0] == 0


def test_a_damaged_file_of_a_comparison_is_named(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compare", *source, "--out", tmp_path / "out", "--patterns", "2:4", "--methods", "random"]
    with interrupted(Session, "attempt", 1, monkeypatch):
        assert run(*command)[0] == 130
    for name in ("dense", "cells/2%3A4 none"):
        path = tmp_path / "out.partial" / f"{name}.safetensors"
        whole = path.read_bytes()
        for content in (b"", b"{", whole.replace(b"2", b"3"), whole.replace(b"value", b"valve"), whole[:-9]):
            path.write_bytes(content)
            assert f"{path} is damaged: remove" in fails(*command, "--resume")
        path.unlink()  # it is measured again
    assert run(*command, "--resume")[0] == 0


def orders(out: Path) -> Any:
    record = json.loads((out / "permprune.json").read_text())
    return record["permutations"], record["gathers"]


@pytest.mark.parametrize(("name", "place"), [("cp:escapes=1", "none"), ("reconstruction", "none"), ("ria", "disk")])
def test_what_works_problem_by_problem_goes_on_after_the_last_one(
    source: list[str], tmp_path: Path, name: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, method = (
        ["prune", *source, "--order", name, "--set", f"offload={place}"],
        PERMUTERS[name.partition(":")[0]],
    )
    with counted(method, "order", monkeypatch) as whole:
        assert run(*command, "--out", tmp_path / "whole")[0] == 0
    half = len(whole) // 2
    with interrupted(method, "order", half, monkeypatch):
        code, _, stderr = run(*command, "--out", tmp_path / "out")
    assert code == 130 and "; repeat the command with --resume to continue" in stderr
    with counted(method, "order", monkeypatch) as rest:
        assert run(*command, "--out", tmp_path / "out", "--resume")[0] == 0
    assert len(rest) < len(whole) - half + 3  # the candidates of one problem
    assert orders(tmp_path / "whole") == orders(tmp_path / "out")


@pytest.mark.parametrize("name", ["newton:rounds=1", "permllm:steps=1"])
def test_a_solution_is_not_sought_twice(
    source: list[str], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither that of the search, nor that of the one from whose orders it starts."""
    command, method = ["prune", *source, "--order", name, "--out", tmp_path / "out"], PERMUTERS[name.split(":")[0]]
    with monkeypatch.context() as patch:
        patch.setattr("permprune.engine.held.Held.finish", stop)
        code, _, stderr = run(*command)
    assert code == 130 and "--resume" in stderr
    with monkeypatch.context() as patch:
        for part in ("init", "step"):
            patch.setattr(method, part, lambda *_: pytest.fail("searched again"))
        assert run(*command, "--resume")[0] == 0


def test_no_hint_is_given_where_nothing_was_found(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command, owner, name in (
        (["prune", *source, "--order", "reconstruction"], PERMUTERS["reconstruction"], "order"),
        (["finetune", *source[:1], "--data", source[2], "--rows", "8", "--length", "16"], Trainer, "_add"),
        (["compare", *source], Session, "attempt"),
    ):
        out = [] if command[0] == "compare" else ["--out", tmp_path / "out"]
        with interrupted(owner, name, 0, monkeypatch):
            code, _, stderr = run(*command, *out)
        assert (code, stderr.splitlines()[-1]) == (130, "permprune: interrupted")
        assert not list(tmp_path.glob("out*"))


def test_more_minutes_or_rounds_and_less_memory_go_on_from_the_state(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run("prune", *source, "--order", "newton:rounds=2", "--out", whole)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("permprune.engine.held.Held.finish", stop)
        assert run("prune", *source, "--order", "newton:rounds=1", "--set", "minutes=9", "--out", out)[0] == 130
    more = ["--order", "newton:rounds=2", "--memory", "8GiB"]
    assert run("prune", *source, *more, "--out", out, "--resume")[0] == 0
    assert orders(whole) == orders(out)


def test_the_state_of_another_training_is_refused(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(source[0], teacher)
    command = ["finetune", source[0], "--data", source[2], "--dev", source[4], "--teacher", teacher]
    command += ["--rows", "8", "--length", "16", "--epochs", "2", "--out", tmp_path / "out"]
    with interrupted(Trainer, "_epoch", 1, monkeypatch):
        code, _, stderr = run(*command)
    assert code == 130 and "--resume" in stderr
    for what, change, folder in (
        ("model weights", "model weights", source[0]),
        ("training examples", "calibration examples", source[0]),
        ("held-out examples", "evaluation examples", source[0]),
        ("teacher weights", "model weights", teacher),
    ):
        with changed(change, Path(folder)):
            code, _, stderr = run(*command, "--resume")  # whose warning is that the texts share sentences
            assert code == 2 and f"was saved with another {what}: use the same, or remove" in stderr.splitlines()[-1]
    assert run(*command, "--resume")[0] == 0


@pytest.mark.parametrize("command", ["prune", "compare", "finetune"])
def test_a_second_run_on_one_out_is_refused_at_once(source: list[str], tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    options = [source[0], "--data", source[4], "--out", out]
    with WorkFolder(out).held(command, resume=False) as work:
        (work.path / "state").touch()
        for resume in ([], ["--resume"]):
            assert "another run is writing" in fails(command, *options, *resume)
        assert (work.path / "state").exists()
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def prepared(tiny_llama: LlamaForCausalLM) -> Prepared:
    tokens = torch.randint(0, 128, (30, 8), generator=torch.Generator().manual_seed(0))
    return prepare(tiny_llama, None, PruneConfig(length=8), examples=tokens)


@pytest.mark.parametrize("method", [Random(), Newton(rounds=1, examples=2)], ids=["random", "newton"])
def test_what_was_found_is_recalled_by_all_that_it_depends_on(prepared: Prepared, method: Permuter) -> None:
    network, run = prepared.network, prepared.run
    first = method.solve(network, run)
    assert method.solve(network, run) is first
    assert method.solve(network, dataclasses.replace(run, checkpoint=Checkpoint(None, {}))) is first
    for change in ({"seed": 1}, {"train": run.train[:4]}, {"held_out": run.held_out[:1]}, {"examples_per_window": 2}):
        assert method.solve(network, dataclasses.replace(run, **change)) is not first
    assert method.solve(network, dataclasses.replace(run, minutes=1e-9)) is not first
    other = method.solve(network, dataclasses.replace(run, seed=1))
    assert any(not torch.equal(other.orders[name], order) for name, order in first.orders.items()) or method != Random()
    assert torch.equal(network.orders[network.problems[0].name], other.orders[network.problems[0].name])
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.seed = 1  # type: ignore[misc]


def test_a_journal_keeps_what_was_found_until_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every few seconds, by each rank in a file of its own."""
    kept = Checkpoint(tmp_path, {"seed": 0})
    killed = checkpoint.Journal(kept, "cp")
    killed.add({"a": torch.arange(3)})
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(checkpoint, "EVERY", 0)
    killed.add({"b": torch.arange(2)})
    with monkeypatch.context() as patch:
        patch.setattr("permprune.system.distributed.rank", lambda: 1)
        checkpoint.Journal(kept, "cp").add({"c": torch.arange(4)})
    found = checkpoint.Journal(kept, "cp")
    assert {name: len(tensor) for name, tensor in found.tensors.items()} == {"a": 3, "b": 2, "c": 4}
    assert found.seconds > 0


def test_training_on_answers_goes_on_from_its_last_step(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside text, of which batches take other shapes."""
    answers, text = write_answers(tmp_path / "answers.jsonl", 30), write_text(tmp_path / "text.txt", "some words")
    command = ["prune", tiny_checkpoint, "--calibration", answers, "--calibration", text, "--data", answers, *SMALL]
    command += ["--order", "newton:rounds=0", "--train", "steps=4", "--set", "examples=0"]
    assert run(*command, "--out", tmp_path / "whole")[0] == 0
    monkeypatch.setattr("permprune.system.search_state.EVERY", 0.0)
    with interrupted(KeptWeights, "step", 2, monkeypatch):
        assert run(*command, "--out", tmp_path / "out")[0] == 130
    with counted(KeptWeights, "step", monkeypatch) as rest:
        assert run(*command, "--out", tmp_path / "out", "--resume")[0] == 0
    assert len(rest) == 2
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
