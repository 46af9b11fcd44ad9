"""Options that mean nothing: each is refused in one line that names it, before any work is done."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from permprune import (
    Evaluation,
    Examples,
    FineTuning,
    PermpruneError,
    PruneConfig,
    TaskList,
    evaluate,
    evaluate_model,
    prune_to_folder,
)
from permprune.cli.settings import parse_bytes
from permprune.evaluation.perplexity import perplexity
from permprune.losses.objective import Objective
from permprune.options import numbers_of
from permprune.permuters.registry import PERMUTERS, permuter
from permprune.permuters.trust_region import Newton
from permprune.saliency.metrics import SALIENCIES
from permprune.training.loop import Training
from permprune.updates.methods import UPDATES

from ..cli.running import fails, run

OPTIONS: list[type] = [
    *PERMUTERS.values(), *SALIENCIES.values(), *UPDATES.values(),
    Objective, PruneConfig, Evaluation, TaskList, FineTuning, Training,
]  # fmt: skip
SHOWN = Examples({"input_ids": torch.zeros(2, 4, dtype=torch.int64)})
REQUIRED = {FineTuning: {"data": None}, TaskList: {"names": ("cb",)}}


@pytest.fixture
def source(tiny_checkpoint: Path, tiny_text: Path) -> list[str]:
    small = ["--length", "16", "--samples", "24", "--windows", "4"]
    return [str(tiny_checkpoint), "--calibration", str(tiny_text), "--data", str(tiny_text), *small]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.__name__)
def test_every_number_of_every_method_has_a_range(options: type) -> None:
    made = options(**REQUIRED.get(options, {}))
    ranges = numbers_of(options)
    for field in dataclasses.fields(options):
        value = getattr(made, field.name)
        assert field.name in ranges or not isinstance(value, (int, float)), field.name
    for name, number in ranges.items():
        wrong: list[object] = ["3", [1], math.nan, math.inf, -math.inf, *([] if number.optional else [None])]
        wrong += [1, 0.0] if number.kind is bool else [True, -1, -0.5, 10**400]
        wrong += [2.5, 2.0] if number.kind is int else []
        for value in wrong:
            with pytest.raises(PermpruneError, match=f"^{name} is .*: give "):
                dataclasses.replace(made, **{name: value})


@pytest.mark.parametrize(
    "name",
    [
        *(
            f"newton:rounds={text}"
            for text in ("6.7", "6.0", "-1", "true", '"3"', "1e400", "1e1", "", " 3", "1_0", "٣")
        ),
        *(f"newton:damping={text}" for text in ("-3", "0", "nan", "inf", "1e400", "true", "null", '"3"', "0x1", "")),
        *(f"newton:{option}" for option in ("examples=0", "swaps=-1", "task=-1")),
        *(f"newton:rounds={'9' * digits}" for digits in (10, 25, 5000)),
        *(f"reconstruction:{option}=0" for option in ("candidates", "shares")),
        *(f"learned:{option}=0" for option in ("groups", "steps", "iterations", "examples")),
        *(f"learned-paper:{option}" for option in ("iterations=0", "check=0", "noise=-1", "margin=-1")),
        *("learned:decay=1.5", "learned:noise=-0.1", "permllm:block=0", "cp:escapes=-1"),
    ],
)
def test_a_permuters_name_takes_what_it_understands(name: str) -> None:
    option = name.split(":")[1].partition("=")[0]
    assert f"{option} is " in fails("prune", "./no-model", "--out", "out", "--order", name)


def test_a_permuters_name_is_understood_whole() -> None:
    assert permuter("newton:rounds=0:damping=3e-5") == Newton(rounds=0, damping=3e-5)
    assert "given rounds twice" in fails("prune", "./no-model", "--out", "out", "--order", "newton:rounds=1:rounds=2")
    for name in ("newton:", "newton::rounds=1", "newton:rounds", "newton:Rounds=1", "ria:power=1"):
        assert "is not an option of" in fails("compare", "./no-model", "--methods", name)
    assert "all loss weights are 0" in fails("compare", "./no-model", "--methods", "newton:task=0")
    assert permuter("newton:task=0:divergence=1").objective.divergence == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *((["prune", "--samples", text], "samples") for text in ("0", "-1", "9" * 30)),
        *((["prune", "--length", text], "length") for text in ("0", "-5")),
        *((["prune", "--set", f"batch={text}"], "batch") for text in ("0", "-1")),
        *((["prune", "--windows", text], "windows") for text in ("0", "-1")),
        *((["prune", "--set", f"seed={text}"], "seed") for text in ("-1", "9" * 23)),
        *((["prune", "--set", f"minutes={text}"], "minutes") for text in ("-1", "0", "nan", "inf")),
        (["compare", "--set", "batch=0"], "batch"),
        *((["compare", option, "0"], option[2:]) for option in ("--samples", "--windows")),
        *((["evaluate", option, "0"], option[2:]) for option in ("--windows", "--length")),
        *((["evaluate", "--tasks", "cb", "--limit", text], "limit") for text in ("0", "-1")),
        *((["compare", "--budgets", text], "budgets") for text in ("0", "-1", "nan", "5,inf")),
        *(
            (["finetune", option, "0"], option[2:])
            for option in ("--epochs", "--lr", "--batch", "--length", "--rows", "--adapters")
        ),
        *((["finetune", option, "nan"], option[2:]) for option in ("--lr", "--hidden")),
        (["finetune", "--hidden", "-1"], "hidden"),
        (["finetune", "--seed", "-1"], "seed"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_numbers_out_of_range_are_one_line(
    command: list[str], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *rest = command
    out = ["--out", "out"] if name in ("prune", "compare", "finetune") else []
    line = fails(name, "./no-model", *out, *rest)  # refused before the model is looked for
    assert f"{option} is " in line and any(least in line for least in ("from 0", "from 1", "from 2", "above 0"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["1e400GiB", "nanGiB", "infGiB", "0", "-1GiB", "0.1B", "GiB", "", "1e30GiB"])
def test_memory_is_a_finite_amount(text: str) -> None:
    assert "memory" in fails("prune", "./no-model", "--out", "out", "--memory", text)
    assert parse_bytes("1B") == 1


@pytest.mark.parametrize("command", ["prune", "compare"])
def test_a_glob_that_excludes_nothing_is_named(command: str, source: list[str], tmp_path: Path) -> None:
    out = [] if command == "compare" else ["--out", tmp_path / "out"]
    globs = ["--set", "exclude=*.q_proj", "--set", "exclude=*.qproj"]
    assert '"*.qproj" matches no layer' in fails(command, *source, *out, *globs)
    assert not (tmp_path / "out").exists()


def test_a_glob_may_match_what_another_does(source: list[str], tmp_path: Path) -> None:
    globs = ["--set", "exclude=*.0.*", "--set", "exclude=*.q_proj"]
    assert run("prune", *source, "--out", tmp_path / "out", "--order", "none", *globs)[0] == 0
    assert run("verify", tmp_path / "out")[1].startswith("6 layers")


@pytest.mark.parametrize("command", ["prune", "compare", "finetune"])
@pytest.mark.parametrize("out", ["", ".", "..", "/", "file/out", "link", "a\udcffb"])
def test_out_is_a_new_name_in_a_folder(
    command: str, out: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    line = fails(command, tiny_checkpoint, "--out", out)
    assert any(part in line for part in ("exists already", "cannot write", "not UTF-8"))
    assert {path.name for path in folder.iterdir()} == {"file", "link"}


def test_names_hold_no_nul() -> None:
    """No shell can pass one on; Python can."""
    assert "NUL" in fails("evaluate", "a\0b")
    with pytest.raises(PermpruneError, match="NUL"):
        prune_to_folder("./no-model", Path("a\0b"), PruneConfig(), evaluation=Evaluation())


def test_the_objects_refuse_what_the_command_line_refuses() -> None:
    for make in (
        lambda: Newton(rounds=-1),
        lambda: Newton(rounds=6.7),  # type: ignore[arg-type]
        lambda: PruneConfig(mode="luck"),
        lambda: PruneConfig(pattern="24"),
        lambda: PruneConfig(exclude="lm_head"),  # type: ignore[arg-type]
        lambda: TaskList("arc_easy"),  # type: ignore[arg-type]
        lambda: evaluate("smollm2-135m", "text.txt"),  # type: ignore[arg-type]
        lambda: Objective(0.0),
        lambda: evaluate_model(nn.Linear(2, 2), SHOWN, batch=0),
        lambda: perplexity(nn.Linear(2, 2), SHOWN, batch=0),
    ):
        with pytest.raises(PermpruneError, match=r"give|choose|pattern"):
            make()
    assert Newton(damping=3).damping == 3  # whole numbers are numbers
