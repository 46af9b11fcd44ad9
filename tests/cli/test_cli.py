"""The command line, run as a person runs it."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from permprune.cli.settings import PYTHON_ONLY, options_of, parse_bytes, set_options, settings_from
from permprune.config import PruneConfig
from permprune.engine.measuring import Evaluation
from permprune.errors import PermpruneError
from permprune.jobs.finetune import FineTuning
from permprune.kv.config import KVConfig
from permprune.options import numbers_of
from permprune.permuters.registry import PERMUTERS
from permprune.permuters.trust_region import Newton
from permprune.saliency.metrics import SALIENCIES
from permprune.system.search_state import Checkpoint
from permprune.updates.methods import UPDATES

from .running import COMMAND, fails, run

SMALL = ["--length", "16", "--samples", "24", "--windows", "4"]


@pytest.fixture
def source(tiny_checkpoint: Path, tiny_text: Path) -> list[str]:
    return [str(tiny_checkpoint), "--calibration", str(tiny_text), "--data", str(tiny_text), *SMALL]


def test_prune_verify_evaluate(source: list[str], tiny_text: Path, tmp_path: Path) -> None:
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    code, stdout, _ = run("prune", *source, "--out", out, "--order", "ria", "--mode", "gather")
    assert code == 0 and "2:4 with ria: perplexity" in stdout
    assert {"config.json", "permprune.json", "report.html", "tokenizer.json"} <= {p.name for p in out.iterdir()}
    assert not (tmp_path / "out.partial").exists()
    code, stdout, _ = run("verify", out)
    assert code == 0 and "14 layers hold the pattern" in stdout
    code, stdout, _ = run("evaluate", out, "--data", tiny_text, "--windows", "4", "--length", "16", "--json", figures)
    assert code == 0
    found = json.loads(figures.read_text())
    assert {"task", "metric", "value", "tokens"} <= found.keys()
    record = json.loads((out / "permprune.json").read_text())
    assert found["value"] == pytest.approx(record["measured"]["pruned"], rel=1e-4)


def test_a_pruned_model_that_overflows_is_written(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_text: Path, tmp_path: Path
) -> None:
    """Queries and keys are large, and cancel each other until one of three weights is pruned."""
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[:, 1:3] = tiny_llama.model.embed_tokens.weight[:, :1]
        attention = tiny_llama.model.layers[0].self_attn
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight[:, :3] = torch.tensor([2.0, -1.0, -1.0]) * 2.0**66
    model, out = tmp_path / "model", tmp_path / "out"
    tiny_llama.save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    options = ["--calibration", tiny_text, "--data", tiny_text, *SMALL, "--order", "none", "--set", "precision=fp32"]
    code, stdout, stderr = run("prune", model, *options, "--set", "exclude=*.layers.1.*", "--out", out)
    assert code == 0 and "perplexity not finite against" in stdout and stderr.count("overflow") == 1
    assert json.loads((out / "permprune.json").read_text())["measured"]["pruned"] is None
    code, stdout, _ = run("verify", out)
    assert code == 0 and "7 layers hold the pattern" in stdout


@pytest.mark.slow
def test_prune_and_verify_a_mix_of_patterns(source: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, _ = run("prune", *source, "--out", out, "--order", "ria", "--mode", "gather", "--pattern", "mixed")
    assert code == 0 and "A mix of patterns with ria: perplexity" in stdout
    assert run("verify", out)[0] == 0
    record = json.loads((out / "permprune.json").read_text())
    assert record["mix"]["uniform"] and record["mix"]["keep"] <= 0.5
    assert "The mix keeps" in (out / "README.md").read_text()
    for layer in record["layers"]:
        layer["pattern"] = "1:4"
    (out / "permprune.json").write_text(json.dumps(record))
    assert "is not 1:4 in stored order" in fails("verify", out)
    assert "a mix of patterns" in fails(
        "prune", *source, "--out", tmp_path / "o", "--memory", "9KB", "--pattern", "mixed"
    )


@pytest.mark.slow
def test_prune_and_compare_take_an_update(source: list[str], tmp_path: Path) -> None:
    figures, out = tmp_path / "compare.json", tmp_path / "out"
    code, stdout, _ = run("compare", *source, "--methods", "random", "--update", "sparsegpt", "--json", figures)
    assert code == 0 and "sparsegpt update" in " ".join(stdout.split())
    result = json.loads(figures.read_text())
    assert result["settings"]["update"] == "sparsegpt"
    code, stdout, _ = run("prune", *source, "--order", "random", "--update", "sparsegpt", "--out", out)
    assert code == 0 and "2:4 with random, then sparsegpt: perplexity" in stdout
    record = json.loads((out / "permprune.json").read_text())
    assert record["settings"]["update"] == "sparsegpt"
    assert record["measured"]["pruned"] == pytest.approx(result["rows"][-1]["perplexity"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_prune_keeps_to_a_memory_limit(source: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "raise --memory" in fails("prune", *source, "--out", out, "--memory", "10KB")
    code, stdout, _ = run("prune", *source, "--out", out, "--order", "ria", "--memory", "200KB")
    assert code == 0 and "2:4 with ria: perplexity" in stdout
    record = json.loads((out / "permprune.json").read_text())
    assert record["permutations"] and record["settings"]["offload"] == "disk"
    assert run("verify", out)[0] == 0 and not (tmp_path / "out.partial").exists()


def test_plan_says_what_prune_would_take(source: list[str], tmp_path: Path) -> None:
    figures = tmp_path / "plan.json"
    settings = ["--order", "newton:rounds=2", "--length", "16", "--samples", "24"]
    code, stdout, _ = run("plan", source[0], *settings, "--windows", "4", "--gpu", "rtx4090", "--json", figures)
    assert code == 0
    for said in (
        "newton: proposals",
        "second moments",
        "NVIDIA RTX 4090",
        "of device memory",
        "disk: ",
        "as they are; about",
    ):
        assert said in stdout
    found = json.loads(figures.read_text())
    assert {"device", "host", "disk", "stages", "settings", "assumed"} <= found.keys()
    code, stdout, _ = run("plan", source[0], "--order", "ria")
    assert code == 0 and "ria" in stdout and "peak: " in stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--gpu", "h10"], "gpu is 'h10': did you mean \"h100\"?"),
        (["--memory", "9KB"], "the model takes about"),
        (["--memory", "9KB", "--pattern", "mixed"], "a mix of patterns needs all layers in memory"),
        (["--pattern", "2:5"], "which 5 does not divide"),
        (["--order", "luck"], 'unknown permuter "luck"'),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_line(tiny_checkpoint: Path, change: list[str], message: str) -> None:
    assert message in fails("plan", tiny_checkpoint, *change)


@pytest.mark.parametrize("settings", [PruneConfig, FineTuning, KVConfig])
def test_the_options_are_the_settings(settings: type) -> None:
    offered = options_of(settings)
    fields = {field.name for field in dataclasses.fields(settings) if field.init}
    assert offered.keys() == fields - {*PYTHON_ONLY}
    assert settings_from(settings, {name: option.default for name, option in offered.items()}) == settings()


def test_the_values_of_options_become_settings() -> None:
    values = {"pattern": "4:8", "memory": "1MiB", "exclude": ["*.o_proj"], "calibration": [], "recompute": True}
    chosen = settings_from(PruneConfig, {**values, "effort": "hour", "minutes": 7.0})
    assert chosen == PruneConfig(
        pattern="4:8", memory=2**20, exclude=("*.o_proj",), recompute=True, effort="hour", minutes=7.0
    )


def test_first_comes_what_people_need_first() -> None:
    panels = Counter(option.rich_help_panel for option in COMMAND.commands["prune"].params[1:])
    assert panels[None] <= 10 and len(panels) == 4 and sum(panels.values()) <= 22


def test_rare_settings_are_set_by_name() -> None:
    texts = ["batch=1", "recompute=true", "exclude=*.0.*", "exclude=*.1.*", "metric=f1", "minutes=2.5", "saliency=ria"]
    values = set_options([PruneConfig, Evaluation], texts)
    expected = {"batch": 1, "recompute": True, "exclude": ["*.0.*", "*.1.*"], "metric": "f1", "minutes": 2.5}
    assert values == {**expected, "saliency": "ria"}
    assert settings_from(PruneConfig, values) == PruneConfig(
        batch=1, recompute=True, exclude=("*.0.*", "*.1.*"), minutes=2.5, saliency="ria"
    )
    for wrong in ("batsch=1", "examples=3", "pattern=2:4", "batch", "batch=none", "recompute=yes"):
        with pytest.raises(PermpruneError, match=r"did you mean|choose one of|give"):
            set_options([PruneConfig, Evaluation], [wrong], without=["examples"])
    assert "no option --batch: give --set batch=VALUE" in fails("prune", "model", "--batch", "1")
    assert set_options([PruneConfig], ["batch=1", "batch=2"]) == {"batch": 2}


def test_methods_are_listed_and_explained() -> None:
    code, stdout, _ = run("methods")
    assert code == 0 and {*PERMUTERS, *SALIENCIES, *UPDATES, "objective"} <= set(re.findall(r"[\w-]+", stdout))
    code, stdout, _ = run("methods", "newton")
    assert code == 0 and all(option in stdout for option in numbers_of(Newton)) and "at most" not in stdout
    assert "permuter" not in run("methods", "wanda")[1]
    assert 'did you mean "newton"' in fails("methods", "newtn")


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("prune smol", "smollm2-135m"),
        ("compare model --methods ria,new", "ria,newton"),
        ("prune model --update sp", "sparsegpt"),
        ("verif", "verify"),
    ],
)
def test_the_tab_key_completes_names(typed: str, completed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_PERMPRUNE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"permprune {typed}")
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split())))
    assert completed in run()[1].split()


def test_inspect_lists_and_proves_the_spaces(tiny_checkpoint: Path) -> None:
    code, stdout, _ = run("inspect", tiny_checkpoint, "--verify")
    assert code == 0
    assert "residual" in stdout and "max difference" in stdout


@pytest.mark.slow
def test_inspect_proves_a_model_of_two_inputs(tiny_whisper: Path) -> None:
    code, stdout, _ = run("inspect", tiny_whisper, "--verify")
    assert code == 0 and "heads" in stdout and "max difference" in stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--pattern", "24"], '"24" is not an N:M pattern'),
        (["--pattern", "4:4"], "keeps no or all weights"),
        (["--pattern", "2:5"], "which 5 does not divide"),
        (["--set", "saliency=luck"], 'unknown saliency "luck"'),
        (["--update", "luck"], 'unknown update "luck": choose one of none, sparsegpt, admm'),
        (["--order", "luck"], 'unknown permuter "luck"'),
        (["--mode", "luck"], "mode is 'luck': choose one of fold, gather"),
        (["--set", "precision=int8"], "precision is 'int8': choose one of auto, fp32, bf16"),
        (["--set", "batch=0"], "batch is 0: give a whole number from 1"),
        (["--memory", "much"], "is not an amount of memory"),
        (["--calibration", "missing/text.txt"], "no data at missing/text.txt"),
        (["--data", "missing/text.txt"], "no data at missing/text.txt"),
        (["--set", "exclude=*"], "no linear layer to prune"),
        (["--length", "1"], "length is 1: give a whole number from 2"),
    ],
)
def test_bad_input_is_one_line(source: list[str], tmp_path: Path, change: list[str], message: str) -> None:
    assert message in fails("prune", *source, "--out", tmp_path / "out", *change)
    assert not (tmp_path / "out").exists()


def test_an_empty_calibration_text_is_one_line(source: list[str], tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert "holds no text" in fails("prune", *source, "--out", tmp_path / "out", "--calibration", empty)


def test_fetch_prints_the_folder_of_a_model_of_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("permprune.zoo.models.cached", lambda entry, fill: tmp_path / entry)
    code, stdout, _ = run("fetch", "smollm2-135m")
    assert (code, Path(stdout.strip()).parent) == (0, tmp_path / "models")
    assert 'the zoo has no model "smollm"' in fails("fetch", "smollm")


def test_a_missing_model_or_folder_is_one_line(tmp_path: Path) -> None:
    assert "missing/model" in fails("evaluate", "./missing/model")
    assert "permprune.json" in fails("verify", tmp_path)


def test_existing_output_is_not_overwritten(source: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "exists already" in fails("prune", *source, "--out", tmp_path / "out")
    assert "no folder" in fails("prune", *source, "--out", tmp_path / "no" / "out")


def test_nan_weights_are_one_line(source: list[str], tiny_llama: torch.nn.Module, tmp_path: Path) -> None:
    tiny_llama.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")  # type: ignore[union-attr,index,operator]
    tiny_llama.save_pretrained(source[0])  # type: ignore[operator]
    assert "holds NaN" in fails("prune", *source, "--out", tmp_path / "out")


@pytest.mark.slow
def test_a_full_disk_loses_nothing(source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    arguments = ["prune", *source, "--out", tmp_path / "out", "--order", "newton:rounds=5"]
    with monkeypatch.context() as patch:
        patch.setattr("permprune.engine.held.write_weights", full)
        code, _, stderr = run(*arguments)
        assert code == 2 and "No space left on device" in stderr.splitlines()[-1]
    assert (tmp_path / "out.partial" / "newton.safetensors").exists() and not (tmp_path / "out").exists()
    free = [
        "--update",
        "sparsegpt",
        "--set",
        "batch=2",
        "--set",
        "recompute=true",
    ]  # which the search does not depend on
    code, _, _ = run(*arguments, "--resume", *free)
    assert code == 0
    used = json.loads((tmp_path / "out" / "permprune.json").read_text())["settings"]
    assert used["update"] == "sparsegpt" and used["recompute"] is True


@pytest.mark.slow
def test_ctrl_c_says_how_to_resume(source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Checkpoint.save

    def interrupt(self: Checkpoint, name: str, *args: Any, **options: Any) -> None:
        save(self, name, *args, **options)
        if name == "newton":
            raise KeyboardInterrupt

    whole, out = tmp_path / "whole", tmp_path / "out"
    arguments = ["prune", *source, "--order", "newton:rounds=2"]
    assert run(*arguments, "--out", whole)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", interrupt)
        code, _, stderr = run(*arguments, "--out", out)
    assert code == 130 and "--resume" in stderr and not out.exists()
    code, _, stderr = run(*arguments, "--out", out, "--set", "seed=1", "--resume")
    assert code == 2 and "seed: use the same" in stderr.splitlines()[-1]
    assert run(*arguments, "--out", out, "--resume")[0] == 0
    first, second = (json.loads((folder / "permprune.json").read_text()) for folder in (whole, out))
    assert first["permutations"] == second["permutations"]


def test_bytes() -> None:
    assert parse_bytes("8GiB") == 8 * 2**30
    assert parse_bytes("1.5 MB") == 1_500_000
    with pytest.raises(PermpruneError):
        parse_bytes("GiB")
