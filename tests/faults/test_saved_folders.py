"""Folders of pruned models: what is written computes what was pruned, and stays pruned whatever is done with it."""

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

import permprune
from permprune.checkpoints.origin import held_patterns
from permprune.checkpoints.record import RECORD, read_record
from permprune.checkpoints.weights import GATHERED

from ..cli.running import fails, run
from .pruned import SETTINGS, SMALL, TUNED, WINDOWS, commands, logits, options, write_pruned, write_source

MODES = ["fold", "gather"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_source(tmp_path_factory.mktemp("models") / "dense", tiny_tokenizer)


@pytest.fixture(scope="module")
def pruned(source: Path) -> dict[str, Path]:
    """A folder of each mode; shared, so leave them as they are."""
    for mode in MODES:
        write_pruned(source, source.with_name(mode), mode)
    return {mode: source.with_name(mode) for mode in MODES}


@pytest.fixture
def gathered(pruned: dict[str, Path], tmp_path: Path) -> Path:
    """A folder with gathers, to change."""
    return Path(shutil.copytree(pruned["gather"], tmp_path / "gathered"))


def perplexity(folder: Path, tmp_path: Path) -> float:
    figures = tmp_path / "figures.json"
    assert run("evaluate", folder, "--data", folder / "text.txt", *SMALL, "--json", figures)[0] == 0
    return float(json.loads(figures.read_text())["value"])


def edit_record(folder: Path, **fields: Any) -> None:
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, **fields}))


# Written from Python


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_a_folder_written_from_python_is_whole(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, mode: str, dtype: torch.dtype
) -> None:
    source, out = write_source(tmp_path / "source", tiny_tokenizer, dtype), tmp_path / "out"
    done = write_pruned(source, out, mode)
    code, stdout, _ = run("verify", out)
    assert code == 0 and "14 layers hold the pattern" in stdout
    assert {path.name for path in out.iterdir()} - {"text.txt"} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "model.safetensors" if mode == "fold" else GATHERED, "probe.safetensors", RECORD, "report.html", "README.md",
    }  # fmt: skip
    weights = load_file(out / (GATHERED if mode == "gather" else "model.safetensors"))
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert done.model.dtype == torch.float32, "the model in memory keeps its type"
    difference = (logits(permprune.load(out)) - logits(done.model)).abs().max()
    assert difference < (1e-6 if dtype == torch.float32 else 0.05)
    record = json.loads((out / RECORD).read_text())
    assert record["measured"] is None and record["settings"]["calibration"] == "12 examples given in Python"
    assert record["model"] == str(source) and "was not measured" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("mode", MODES)
def test_python_and_the_command_line_write_the_same_model(source: Path, tmp_path: Path, mode: str) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    assert run("prune", source, *options(source), "--order", "ria", "--mode", mode, "--out", out)[0] == 0
    model, tokenizer, _ = permprune.read_model(str(source))
    settings = {"calibration": str(source / "text.txt"), "length": 16, "samples": 24, "shared": True}
    permprune.prune(model, tokenizer, order="ria", mode=mode, **settings).save_pretrained(again, tokenizer)
    one, other = (permprune.load(folder).state_dict() for folder in (out, again))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    first, second = (json.loads((folder / RECORD).read_text()) for folder in (out, again))
    assert first.keys() == second.keys()
    assert all(first[key] == second[key] for key in ("layers", "permutations", "gathers", "sample", "versions"))


def test_a_model_pruned_in_half_precision_is_stored_so(tmp_path: Path, tiny_llama: torch.nn.Module) -> None:
    done = permprune.prune(tiny_llama.to(torch.bfloat16), examples=WINDOWS, mode="gather", **SETTINGS)
    done.save_pretrained(tmp_path / "out")
    assert permprune.verify(tmp_path / "out").layers == 14
    assert permprune.load(tmp_path / "out").dtype == torch.bfloat16


def test_a_folder_that_loads_as_another_model_does_not_appear(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a plain load builds in another order than the one that was written, for a reason that no analysis knows."""
    plain = LlamaForCausalLM.from_pretrained.__func__  # type: ignore[attr-defined]

    def in_another_order(kind: type[LlamaForCausalLM], *args: Any, **options: Any) -> Any:
        loaded = plain(kind, *args, **options)
        if isinstance(loaded, LlamaForCausalLM) and "out" in str(args[0]):
            weight = loaded.model.layers[0].mlp.down_proj.weight
            weight.data = weight.data.flip(1)
        return loaded

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(in_another_order))
    out = tmp_path / "out"
    expected = "the written model, loaded again, computes other outputs than the masked model did"
    code, _, stderr = run("prune", source, *options(source), "--order", "ria", "--out", out)
    assert code == 2 and stderr.splitlines()[-1].startswith(f"permprune: {expected}"), stderr
    model, tokenizer, _ = permprune.read_model(str(source))
    done = permprune.prune(model, tokenizer, examples=WINDOWS, **SETTINGS)
    with pytest.raises(permprune.PermpruneError, match=expected):
        done.save_pretrained(out, tokenizer)
    with pytest.raises(permprune.PermpruneError, match=expected):
        permprune.save(done.model, out, tokenizer)
    assert not [*tmp_path.iterdir()]


def test_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    done = write_pruned(source, tmp_path / "out", "fold")
    before = (tmp_path / "out" / RECORD).read_bytes()
    with pytest.raises(permprune.PermpruneError, match="exists already"):
        done.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / RECORD).read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_filled_does_not_appear(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    done = write_pruned(source, tmp_path / "out", "fold")
    monkeypatch.setattr("permprune.checkpoints.probe.save_file", full)
    with pytest.raises(permprune.PermpruneError, match="No space left on device"):
        done.save_pretrained(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_that_have_changed_since_are_not_taken_for_the_pruned_ones(source: Path, tmp_path: Path) -> None:
    done = write_pruned(source, tmp_path / "out", "gather")
    with torch.no_grad():
        done.model.model.norm.weight += 0.5  # as training would
    with pytest.raises(permprune.PermpruneError, match=r"write it with permprune\.save"):
        done.save_pretrained(tmp_path / "tuned")
    permprune.save(done.model, tmp_path / "tuned")
    assert run("verify", tmp_path / "tuned")[0] == 0
    assert torch.equal(logits(permprune.load(tmp_path / "tuned")), logits(done.model))
    with torch.no_grad():
        done.model.model.layers[0].mlp.up_proj.weight += 1e-3
    for write in (done.save_pretrained, lambda folder: permprune.save(done.model, folder)):
        with pytest.raises(permprune.PermpruneError, match=r"permprune\.save|up_proj is not 2:4"):
            write(tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


# A plain save_pretrained


@pytest.mark.parametrize(
    "change", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_plain_save_pretrained_refuses_to_drop_gathers(pruned: dict[str, Path], tmp_path: Path, change: Any) -> None:
    loaded = permprune.load(pruned["gather"])
    model = change(loaded)
    assert torch.equal(logits(model), logits(loaded))
    for part in (model, model.model):
        with pytest.raises(permprune.PermpruneError, match=r"permprune\.save\(model, folder\), or Pruned\.save_pret"):
            part.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    permprune.save(model, tmp_path / "out")
    assert torch.equal(logits(permprune.load(tmp_path / "out")), logits(loaded))
    assert run("verify", tmp_path / "out")[0] == 0
    assert read_record(tmp_path / "out") == read_record(pruned["gather"])


def test_a_folded_model_is_a_plain_checkpoint_all_the_same(pruned: dict[str, Path], tmp_path: Path) -> None:
    model = permprune.load(pruned["fold"])
    model.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(logits(plain), logits(model))
    permprune.save(model, tmp_path / "whole")
    assert run("verify", tmp_path / "whole")[0] == 0


def test_a_model_that_was_not_pruned_has_its_own_way_to_be_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(permprune.PermpruneError, match="did not prune this model"):
        permprune.save(permprune.read_model(str(source))[0], tmp_path / "out")


# Models with gathers as input


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_pruning_a_gathered_model_keeps_its_gathers(
    pruned: dict[str, Path], tmp_path: Path, mode: str, pattern: str
) -> None:
    folder, out = pruned["gather"], tmp_path / "out"
    figures = [*options(folder), "--mode", mode, "--pattern", pattern, "--order", "random", "--set", "seed=1"]
    assert run("prune", folder, *figures, "--out", out)[0] == 0
    assert run("verify", out)[0] == 0, "it computes what the masked model did, whose gathers were those of the folder"
    record = json.loads((out / RECORD).read_text())
    shutil.copy(folder / "text.txt", out)
    assert record["measured"]["dense"] == pytest.approx(perplexity(folder, tmp_path), rel=1e-5)
    assert record["measured"]["pruned"] == pytest.approx(perplexity(out, tmp_path), rel=1e-5)
    places = [(gather["output"], name) for gather in record["gathers"] for name in gather["inputs"] or [""]]
    old = read_record(folder).gathers
    assert len(places) == len(set(places)) >= len(old)


def test_an_order_after_a_gather_is_composed_with_it(source: Path, tmp_path: Path) -> None:
    """Pruned to what it holds already, in its own order, a gathered model stays as it is to the last bit."""
    model = write_pruned(source, tmp_path / "once", "gather").model
    before, state = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    same = permprune.prune(model, examples=WINDOWS, mode="gather", **{**SETTINGS, "order": "none"})
    assert torch.equal(logits(model), before) and same.gathers == read_record(tmp_path / "once").gathers
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    again = permprune.prune(model, examples=WINDOWS, mode="gather", pattern="3:4", seed=5, **SETTINGS)
    assert again.gathers != same.gathers
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(permprune.load(tmp_path / "again")), logits(model))


def test_comparing_methods_on_a_gathered_model_starts_from_it(pruned: dict[str, Path], tmp_path: Path) -> None:
    figures = tmp_path / "compare.json"
    arguments = [*options(pruned["gather"]), "--methods", "random", "--json", figures]
    assert run("compare", pruned["gather"], *arguments)[0] == 0
    dense = json.loads(figures.read_text())["dense"]
    assert dense["perplexity"] == pytest.approx(perplexity(pruned["gather"], tmp_path), rel=1e-5)


def test_a_gathered_model_is_not_offloaded(pruned: dict[str, Path], tmp_path: Path) -> None:
    arguments = [*options(pruned["gather"]), "--order", "ria", "--memory", "300KB", "--out", tmp_path / "out"]
    assert "reorders channels at run time can only be pruned in memory" in fails("prune", pruned["gather"], *arguments)


# Fine-tuning


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "mixed"])
def test_finetune_finds_the_zeros_of_a_plain_checkpoint(source: Path, tmp_path: Path, pattern: str) -> None:
    model, tokenizer, _ = permprune.read_model(str(source))
    permprune.prune(model, examples=WINDOWS, pattern=pattern, **SETTINGS)
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    before = held_patterns(model)
    assert pattern == "mixed" or (len(before) == 14 and set(map(str, before.values())) == {pattern})
    assert before
    assert run("finetune", tmp_path / "plain", "--data", source / "text.txt", *TUNED, "--out", tmp_path / "out")[0] == 0
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert held_patterns(tuned) == before
    for name in before:
        old, new = (one.get_parameter(f"{name}.weight") for one in (model, tuned))
        assert torch.equal(old == 0, new == 0) and not torch.equal(old, new)
    assert not (tmp_path / "out" / RECORD).exists()


@pytest.mark.parametrize("mode", MODES)
def test_finetune_keeps_zeros_that_a_record_leaves_out(pruned: dict[str, Path], tmp_path: Path, mode: str) -> None:
    folder = Path(shutil.copytree(pruned[mode], tmp_path / "pruned"))
    edit_record(folder, layers=[])
    assert run("finetune", folder, "--data", folder / "text.txt", *TUNED, "--out", tmp_path / "out")[0] == 0
    assert len(held_patterns(permprune.load(tmp_path / "out"))) == 14
    assert run("verify", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("mode", MODES)
def test_packed_weights_are_neither_pruned_nor_trained(pruned: dict[str, Path], tmp_path: Path, mode: str) -> None:
    assert run("pack", pruned[mode], "--out", tmp_path / "packed")[0] == 0
    shutil.copy(pruned[mode] / "text.txt", tmp_path / "packed")
    lines = commands(tmp_path / "packed", tmp_path / "out")
    for name in ("prune", "finetune"):
        assert "packed or quantized: unpack them first (permprune unpack)" in fails(*lines[name])


def test_a_model_that_was_packed_in_memory_has_its_own_way_to_be_written(
    pruned: dict[str, Path], tmp_path: Path
) -> None:
    model = permprune.load(pruned["gather"])
    permprune.pack(model, {layer.name: layer.pattern for layer in read_record(pruned["gather"]).layers})
    with pytest.raises(permprune.PermpruneError, match="this model is packed"):
        permprune.save(model, tmp_path / "out")


def test_finetune_of_a_folder_in_half_precision(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", tiny_tokenizer, torch.bfloat16)
    for mode in MODES:
        write_pruned(source, tmp_path / mode, mode)
        out = tmp_path / f"{mode}-tuned"
        assert run("finetune", tmp_path / mode, "--data", source / "text.txt", *TUNED, "--out", out)[0] == 0
        assert run("verify", out)[0] == 0 and permprune.load(out).dtype == torch.bfloat16


def test_finetune_refuses_at_once_what_has_lost_its_pattern(pruned: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pruned["fold"], tmp_path / "pruned"))
    model = permprune.load(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 1e-7
    model.save_pretrained(folder)
    command = ["finetune", folder, "--data", folder / "text.txt", *TUNED, "--out", tmp_path / "out"]
    assert "up_proj.weight is not as permprune wrote it" in fails(*command)
    edit_record(folder, digests={})
    assert "up_proj is not 2:4 in stored order" in fails(*command)


def test_a_dense_model_trains_whole(source: Path, tmp_path: Path) -> None:
    assert run("finetune", source, "--data", source / "text.txt", *TUNED, "--out", tmp_path / "out")[0] == 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "out"))
    assert not held_patterns(after)
    assert all(not torch.equal(one, other) for one, other in zip(before.parameters(), after.parameters(), strict=True))


# Orders that are none


ORDERS: dict[str, Any] = {
    "zeros": lambda order: [0] * len(order),
    "one twice": lambda order: [order[1], *order[1:]],
    "from one on": lambda order: [channel + 1 for channel in order],
    "negative": lambda order: [channel - 1 for channel in order],
    "one too few": lambda order: [channel for channel in order if channel != len(order) - 1],
    "one too many": lambda order: [*order, len(order)],
    "fractions": lambda order: [channel + 0.0 for channel in order],
    "truth values": lambda order: [bool(channel) if channel < 2 else channel for channel in order],
    "texts": lambda order: [str(channel) for channel in order],
    "none": lambda order: [],
    "another shape": lambda order: [order],
    "null": lambda order: None,
    "huge": lambda order: [10**30, *order[1:]],
}


@pytest.mark.parametrize("wrong", ORDERS)
def test_a_gather_that_is_no_permutation_is_refused(gathered: Path, tmp_path: Path, wrong: str) -> None:
    gathers = json.loads((gathered / RECORD).read_text())["gathers"]
    gathers[1]["order"] = ORDERS[wrong](gathers[1]["order"])
    edit_record(gathered, gathers=gathers)
    for arguments in commands(gathered, tmp_path / "out").values():
        assert "gather" in fails(*arguments) and not (tmp_path / "out").exists()
    with pytest.raises(permprune.PermpruneError, match="gather"):
        permprune.load(gathered)


@pytest.mark.parametrize("wrong", ORDERS)
def test_a_permutation_that_is_none_is_refused(pruned: dict[str, Path], tmp_path: Path, wrong: str) -> None:
    folder = Path(shutil.copytree(pruned["fold"], tmp_path / "folded"))
    tables = json.loads((folder / RECORD).read_text())["permutations"]
    name = next(name for name, table in tables.items() if len(table) > 1)
    tables[name][0] = ORDERS[wrong](tables[name][0])
    edit_record(folder, permutations=tables)
    for arguments in commands(folder, tmp_path / "out").values():
        assert "permutations" in fails(*arguments) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "place",
    [
        {"output": "model.layers.7.input_layernorm"},
        {"output": "model.layers.0"},
        {"output": "model.layers.0.mlp.up_proj"},
        {"output": "model.rotary_emb"},
        {"output": ""},
        {"output": "", "inputs": [""]},
        {"output": "", "inputs": ["model.layers.0.self_attn"]},
        {"output": "", "inputs": ["model.layers.0.mlp.down_proj"]},
        {"output": "", "inputs": ["model.layers.0.mlp.nothing\nmore"]},
        {"output": "model.norm", "inputs": ["model.layers.0.mlp.up_proj"]},
    ],
)
def test_a_gather_at_a_place_that_it_does_not_fit_is_refused(gathered: Path, tmp_path: Path, place: Any) -> None:
    gathers = json.loads((gathered / RECORD).read_text())["gathers"]
    gathers[0] |= place
    edit_record(gathered, gathers=gathers)
    for arguments in commands(gathered, tmp_path / "out").values():
        assert "gather" in fails(*arguments) and not (tmp_path / "out").exists()


def test_two_gathers_at_one_place_are_refused(gathered: Path) -> None:
    gathers = json.loads((gathered / RECORD).read_text())["gathers"]
    edit_record(gathered, gathers=[*gathers, gathers[0]])
    assert "two gathers at the" in fails("verify", gathered)
