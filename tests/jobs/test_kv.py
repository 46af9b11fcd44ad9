"""Pruned caches from the calibration to the evaluation, in Python and on the command line."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import permprune
from permprune.checkpoints.origin import Origin, set_origin
from permprune.engine.measuring import Evaluation
from permprune.errors import PermpruneError
from permprune.jobs.kv import calibrate_kv, evaluate_kv, find_channels
from permprune.jobs.kv_search import KVSearch
from permprune.kv.cache import PrunedCache
from permprune.kv.calibration import ObservedLayer, observe_states
from permprune.kv.config import KVConfig
from permprune.kv.evaluation import CacheMeter
from permprune.kv.files import read_channels, read_record, weights_of, write_cache
from permprune.kv.moving import Moving
from permprune.models.forward import cache_argument
from permprune.permuters.base import Identity
from permprune.permuters.cp import CP
from permprune.permuters.kept import RIAPermuter

from ..cli.running import fails, run
from ..faults.pruned import write_source
from ..kv.reference import coded_channels, random_channels


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """What `permprune kv` wrote for the tiny model; shared, so leave it as it is."""
    place = tmp_path_factory.mktemp("kv")
    source = write_source(place / "source", tiny_tokenizer)
    text = ("--calibration", source / "text.txt", "--data", source / "text.txt", "--length", "64")
    few = ("--samples", "4", "--windows", "2", "--window", "8", "--pattern", "1:8")
    code, said, _ = run("kv", source, "--out", place / "out", *text, *few)
    assert code == 0
    assert "keys 1:8: " in said and "perplexity" in said and f"written to {place / 'out'}" in said.replace("\n", "")
    return place / "out"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "kv"))


def test_a_cache_is_made_measured_and_used(whole: Path, folder: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    record = json.loads((folder / "kv.json").read_text())
    assert record["shape"]["head_dim"] == 8 and record["config"]["keys"] == "1:8" and record["order"] == "ria"
    assert all(record["kept"][side]["found"] >= record["kept"][side]["natural"] for side in ("keys", "values"))
    measured = record["measured"]
    assert measured["pruned"] == pytest.approx(measured["dense"], rel=0.1) and measured["count"] == 126
    assert measured["dense_bytes"] == 64 * 2 * 2 * 2 * 8 * 4  # one window: tokens, layers, sides, heads, width, fp32
    figures = tmp_path / "figures.json"
    text = whole.parent / "source" / "text.txt"
    options = ("--data", text, "--windows", "2", "--length", "64", "--json", figures)
    code, said, _ = run("evaluate", tiny_checkpoint, "--kv", folder, *options)
    assert code == 0 and "cache " in said
    found = json.loads(figures.read_text())
    assert found["value"] == measured["pruned"] and found["cache_bytes"] == measured["pruned_bytes"]
    model = LlamaForCausalLM.from_pretrained(tiny_checkpoint)
    cache = permprune.PrunedCache.from_pretrained(folder, model, dtype="bf16", window=4)
    assert cache.config == KVConfig("1:8", "1:8", dtype="bf16", window=4)
    tensors = load_file(folder / "kv.safetensors")
    own = cache.layers[1].channels[0]
    assert own is not None and torch.equal(own.order, tensors["layers.1.keys.order"].long())
    coded = permprune.PrunedCache.from_pretrained(folder, model, keys="4bit")
    with pytest.raises(PermpruneError, match="the channels of the keys were not found for 4bit"):
        model(torch.ones(1, 40, dtype=torch.int64), **cache_argument(model, coded))


def test_each_head_gets_bits_within_a_budget(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    out, figures = tmp_path / "kv", tmp_path / "figures.json"
    text = ("--data", tiny_text, "--windows", "2", "--length", "64")
    given = ("--calibration", tiny_text, "--samples", "4", "--window", "8")
    code, said, _ = run("kv", tiny_checkpoint, "--out", out, *text, *given, "--bytes", "0.42")
    assert code == 0 and "keys and values mixed: " in said
    record = read_record(out)
    assert (record.config.keys, record.budget, record.order) == ("mixed", 0.42, "")
    for keys, values in read_channels(out, record).values():
        assert all(own.bits is not None and own.bits.shape == (2,) for own in (keys, values))
    assert run("evaluate", tiny_checkpoint, "--kv", out, *text, "--json", figures)[0] == 0
    assert record.measured is not None and json.loads(figures.read_text())["value"] == record.measured.pruned
    tensors = load_file(out / "kv.safetensors")
    forget(out, "contents")
    save_file({name: t for name, t in tensors.items() if not name.endswith("bits")}, out / "kv.safetensors")
    assert "no bits for each head" in fails("evaluate", tiny_checkpoint, "--kv", out, *text)
    refused = {
        ("--bytes", "0.1"): "--bytes is 0.1",
        ("--bytes", "-1"): "bytes is -1.0: give a number above 0",
        ("--bytes", "0.4", "--keys", "2:4"): "leave out --pattern, --keys, --values",
        ("--bytes", "0.4", "--max-loss", "1%"): "leave out one",
        ("--max-loss", "1%", "--pattern", "4bit"): "leave out --pattern, --keys, --values",
        ("--max-loss", "1 %%"): "give a share of the dense model's value",
        ("--pattern", "mixed", "--dtype", "bf16"): "leave out --pattern, --keys, --values, --dtype and --recovery",
        ("--values", "mixed", "--keys", "2:4"): "leave out --pattern, --keys, --values, --dtype and --recovery",
        ("--order", "cp"): "leave out --order, or give an N:M --pattern",
        ("--pattern", "4bit", "--dtype", "bf16", "--recovery", "zeros"): "leave out --dtype, --recovery, or give",
        ("--bytes", "0.4", "--dtype", "bf16"): "leave out --pattern, --keys, --values, --dtype and --recovery",
    }
    for options, line in refused.items():
        assert line in fails("kv", tiny_checkpoint, "--out", tmp_path / "other", *text, *given, *options)
    assert not (tmp_path / "other").exists()


def test_a_limit_of_the_loss_is_for_text_that_was_held_out(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (other := tmp_path / "other.txt").write_text("the weights of the model are kept in a small order " * 30)
    words = random.Random(0).choices(tiny_text.read_text().split(), k=1000)  # no window is like another
    tiny_text.write_text(" ".join(words))
    seen = Mock(wraps=observe_states)
    monkeypatch.setattr("permprune.jobs.kv.observe_states", seen)
    chosen_on = Mock(wraps=CacheMeter)
    monkeypatch.setattr("permprune.jobs.kv.CacheMeter", chosen_on)
    options: dict[str, Any] = {
        "config": KVConfig(window=4), "evaluation": Evaluation(str(other), 2, 32), "processor": tiny_tokenizer,
        "search": KVSearch(max_loss=0.002, calibration=str(tiny_text), samples=3, length=32),
    }  # fmt: skip
    record = calibrate_kv(tiny_llama, tmp_path / "kv", **options)
    assert record.chosen is not None and record.measured is not None and record.budget is not None
    assert (record.chosen.data, record.measured.data) == (str(tiny_text), str(other))
    assert record.chosen.error and record.chosen.lost + record.chosen.error <= 0.002 and record.chosen.count == 2 * 31
    assert read_record(tmp_path / "kv").chosen == record.chosen
    observed, held_out = seen.call_args.args[1]["input_ids"], chosen_on.call_args_list[0].args[2]["input_ids"]
    assert observed.shape == (3, 32) and held_out.shape == (2, 32)
    assert not (observed[:, None] == held_out).all(-1).any()
    tiny_text.write_text(" ".join(words[:20]))
    with pytest.raises(PermpruneError, match="give more"):
        calibrate_kv(tiny_llama, tmp_path / "short", **options)
    assert not (tmp_path / "short").exists()


def test_the_order_of_the_values_is_folded(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    out, folded = tmp_path / "kv", tmp_path / "folded"
    text = ("--calibration", tiny_text, "--data", tiny_text, "--samples", "1", "--windows", "1", "--length", "40")
    options = ("--out", out, "--fold", folded, *text, "--window", "8")
    assert "leave out --fold, or give an N:M --pattern" in fails("kv", tiny_checkpoint, *options)
    same = ("--out", out, "--fold", out, *text, "--pattern", "2:4")
    assert "are both to be" in fails("kv", tiny_checkpoint, *same)
    code, said, _ = run("kv", tiny_checkpoint, *options, "--pattern", "2:4")
    assert code == 0 and f"the model that it is for to {folded}" in said.replace("\n", "")
    assert json.loads((out / "kv.json").read_text())["model"] == str(folded)
    before, model = (LlamaForCausalLM.from_pretrained(path) for path in (tiny_checkpoint, folded))
    tokens = torch.arange(5, 35)[None]
    torch.testing.assert_close(model(tokens).logits, before(tokens).logits, rtol=1e-4, atol=1e-5)
    layers = [own.model.layers[0].self_attn for own in (before, model)]
    assert not torch.equal(layers[0].v_proj.weight, layers[1].v_proj.weight)
    keys, values = PrunedCache.from_pretrained(out, model).layers[0].channels
    assert values is not None and values.is_natural and keys is not None and not keys.is_natural


def test_the_evaluation_prunes_the_prompt(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_text: Path, tmp_path: Path
) -> None:
    evaluation = Evaluation(str(tiny_text), 2, 64)
    found = {}
    for keys, values in (("dense", "dense"), ("1:4", "1:4")):
        out = tmp_path / keys
        config = KVConfig(keys, values, dtype="auto", window=0, sinks=0, recovery="zeros")
        search = KVSearch(calibration=str(tiny_text), samples=2, length=32)
        record = calibrate_kv(tiny_llama, out, config, search=search, evaluation=evaluation, processor=tiny_tokenizer)
        found[keys] = evaluate_kv(tiny_llama, out, evaluation, tiny_tokenizer)
        assert record.measured is not None and found[keys].result.value == record.measured.pruned
    assert found["dense"].result.value == pytest.approx(record.measured.dense, rel=1e-5)
    assert found["1:4"].result.value != pytest.approx(record.measured.dense, rel=1e-5)
    assert found["1:4"].nbytes < found["dense"].nbytes


def test_an_order_that_spreads_large_channels_keeps_more() -> None:
    layer = ObservedLayer(0, 1)
    states = torch.randn(1, 2, 200, 16) * torch.tensor([3.0] * 4 + [1.0] * 12)
    layer.add(torch.rand(1, 4, 200, 16), states, states)
    kept = {"one group": find_channels({0: layer}, KVConfig("8:16", "8:16"), RIAPermuter())[1]["values"].found}
    for method in (Identity(), RIAPermuter(), CP()):
        channels, shares = find_channels({0: layer}, KVConfig("2:4", "2:4"), method)
        for own in channels[0]:
            own.check("kv")
        kept[method.name] = shares["values"].found
    assert find_channels({0: layer}, KVConfig("2:4", "2:4"), CP(), order_values=False)[0][0][1].is_natural
    assert kept["one group"] > max(kept["ria"], kept["cp"])
    assert kept["ria"] > kept["none"] + 0.05 and kept["cp"] > kept["none"] + 0.05


def test_damaged_folders_are_refused(folder: Path, tiny_llama: LlamaForCausalLM) -> None:
    def refused() -> str:
        with pytest.raises(PermpruneError) as error:
            PrunedCache.from_pretrained(folder, tiny_llama)
        return str(error.value)

    tensors, record = load_file(folder / "kv.safetensors"), json.loads((folder / "kv.json").read_text())
    forget(folder, "contents")
    save_file({name: t for name, t in tensors.items() if "1.values" not in name}, folder / "kv.safetensors")
    assert "lacks tensors of 'layers.1.values'" in refused()
    save_file({name: t for name, t in tensors.items() if "layers.1" not in name}, folder / "kv.safetensors")
    assert "for 1 layers" in refused()
    (folder / "kv.safetensors").write_bytes(b"nothing")
    assert "does not load" in refused()
    for change in ({"format": 2}, {"config": {"keys": "4:4"}}, {"shape": 3}):
        (folder / "kv.json").write_text(json.dumps({**record, **change}))
        assert "kv.json is damaged" in refused()
    (folder / "kv.json").unlink()
    assert "holds no kv.json" in refused()


def forget(folder: Path, *keys: str) -> None:
    """Remove what older releases did not write from the record of a cache."""
    record = json.loads((folder / "kv.json").read_text())
    (folder / "kv.json").write_text(json.dumps({key: value for key, value in record.items() if key not in keys}))


def with_entry(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def changed(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[1, 2] = value
        return tensor

    return changed


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("level", with_entry(1e38), "levels that are not one number from 1e-06 to 1e+06"),
        ("level", with_entry(torch.nan), "levels that are not one number"),
        ("level", with_entry(0), "levels that are not one number"),
        ("level", lambda t: t.double(), "of type torch.float64, not torch.float32"),
        ("weight", with_entry(torch.inf), "weights that are not one number"),
        ("weight", with_entry(-1), "weights that are not one number"),
        ("weight", lambda t: t[:1].clone(), "weights that are not one number from 1e-06 to 1e+06 for each channel"),
        ("order", with_entry(8), "an order that is no permutation"),
        ("order", with_entry(-1), "an order that is no permutation"),
        ("order", lambda t: t.where(t != 3, 4), "an order that is no permutation"),
        ("order", lambda t: t.long(), "of type torch.int64, not torch.int32"),
        ("order", lambda t: t[0].clone(), "lacks tensors of 'layers.1.keys'"),
        ("mean", lambda _: torch.zeros(2, 8), "which its settings do not need"),
        ("kept", lambda _: torch.ones(2, dtype=torch.int32), "which its settings do not need"),
        ("code", lambda _: torch.zeros(1), "which its settings do not need"),
    ],
)
@pytest.mark.parametrize("contents", [True, False])
def test_tensors_of_a_cache_that_do_not_fit_are_refused(
    folder: Path, tiny_checkpoint: Path, tiny_text: Path, *, name: str, change: Any, said: str, contents: bool
) -> None:
    file, key = folder / "kv.safetensors", f"layers.1.keys.{name}"
    tensors = load_file(file)
    save_file({**tensors, key: change(tensors.get(key))}, file)
    if not contents:
        forget(folder, "contents")
    assert said in fails("evaluate", tiny_checkpoint, "--kv", folder, "--data", tiny_text)


def test_channels_and_settings_that_were_not_written_together_are_refused(
    folder: Path, tiny_checkpoint: Path, tiny_text: Path
) -> None:
    record = json.loads((folder / "kv.json").read_text())
    (folder / "kv.json").write_text(json.dumps({**record, "config": {**record["config"], "window": 16}}))
    command = "evaluate", tiny_checkpoint, "--kv", folder, "--data", tiny_text
    assert "does not belong to the settings in kv.json" in fails(*command)
    (folder / "kv.json").write_text(json.dumps(record))
    tensors = load_file(folder / "kv.safetensors")
    tensors["layers.0.values.level"][0, 0] *= 1.01
    save_file(tensors, folder / "kv.safetensors")
    assert "does not belong to the settings in kv.json" in fails(*command)


TEXT = ("--windows", "2", "--length", "64")


@pytest.mark.parametrize("mode", ["fold", "gather"])
def test_a_cache_is_used_with_the_model_that_it_was_made_for(
    folder: Path, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, mode: str
) -> None:
    out, data = tmp_path / "pruned", ("--data", tiny_text, *TEXT)
    given = ("--calibration", tiny_text, "--samples", "24", "--order", "random", "--mode", mode)
    assert run("prune", tiny_checkpoint, "--out", out, *data, *given)[0] == 0
    line = fails("evaluate", out, "--kv", folder, *data)
    assert "this model has other weights: make a cache for it with permprune kv" in line
    own = tmp_path / "own"
    assert run("kv", out, "--out", own, "--calibration", tiny_text, "--samples", "2", *data)[0] == 0
    assert run("evaluate", out, "--kv", own, *data)[0] == 0
    assert "this model has other weights" in fails("evaluate", tiny_checkpoint, "--kv", own, *data)


@pytest.mark.parametrize("made", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cache_does_not_depend_on_the_type_of_the_weights(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, made: torch.dtype, loaded: torch.dtype
) -> None:
    if {made, loaded} == {torch.bfloat16, torch.float16}:  # both rounded
        tiny_llama.bfloat16()
    tiny_llama.float().save_pretrained(tmp_path / "model")
    one, other = (LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype) for dtype in (made, loaded))
    assert weights_of(one).items() & weights_of(other).items()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3] *= 1.05
    assert not weights_of(one).items() & weights_of(other).items()


def test_a_cache_of_an_older_release_is_used_with_a_warning(
    folder: Path, tiny_checkpoint: Path, tiny_text: Path
) -> None:
    record = json.loads((folder / "kv.json").read_text())
    (folder / "kv.json").write_text(json.dumps({**record, "permute": record["order"]}))
    forget(folder, "weights", "contents", "order")
    code, _, said = run("evaluate", tiny_checkpoint, "--kv", folder, "--data", tiny_text, *TEXT)
    assert code == 0
    assert "may be for another model of the same shape: its kv.json has no digest" in " ".join(said.split())


def test_a_cache_for_another_model_is_refused(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    with pytest.raises(PermpruneError, match="is for a model with num_attention_heads 4, and this one has 2"):
        PrunedCache.from_pretrained(folder, LlamaForCausalLM(config))


def test_bad_input_is_one_line(tiny_checkpoint: Path, tiny_text: Path, tiny_bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "kv"
    text = ("--out", out, "--calibration", tiny_text, "--data", tiny_text, "--samples", "1", "--windows", "1")
    assert "3:6 does not divide the 8 channels" in fails(
        "kv", tiny_checkpoint, *text, "--length", "8", "--pattern", "3:6"
    )
    assert "newton orders the channels of weights" in fails("kv", tiny_checkpoint, *text, "--order", "newton")
    assert "no decoder-only language model" in fails("kv", tiny_bert, *text)
    assert "holds no kv.json" in fails("evaluate", tiny_checkpoint, "--kv", tmp_path, "--data", tiny_text)
    assert "leave out --tasks" in fails("evaluate", tiny_checkpoint, "--kv", tmp_path, "--tasks", "piqa")
    assert not out.exists()


def test_values_of_a_pruned_model_are_not_folded(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    set_origin(tiny_llama, Origin("pruned", tiny_llama.dtype, record=Mock()))
    with pytest.raises(PermpruneError, match="the values of pruned have the order that prune gave them"):
        calibrate_kv(tiny_llama, tmp_path / "kv", KVConfig("2:4", "2:4"), fold=tmp_path / "folded")


def test_channels_are_written_for_every_head(folder: Path) -> None:
    tensors = load_file(folder / "kv.safetensors")
    assert len(tensors) == 2 * 2 * 3
    assert all(tensor.shape == (2, 8) for tensor in tensors.values())


def test_means_of_keys_are_written_and_read(folder: Path) -> None:
    shape = torch.full((2, 8), 0.5)
    keys = dataclasses.replace(coded_channels([4, 4], 8), moving=Moving(shape, 2 * shape, 3 * shape))
    record = dataclasses.replace(read_record(folder), config=KVConfig("4bit", "2:4"))
    write_cache(folder, {0: (keys, random_channels(2, 8))}, record)
    read = read_channels(folder, read_record(folder))[0]
    assert read[0].moving is not None and read[1].moving is None and read[0].bits is not None
    assert torch.equal(read[0].moving.frequency, 3 * shape) and read[0].bits.tolist() == [4, 4]
    tensors = load_file(folder / "kv.safetensors")
    forget(folder, "contents")
    save_file({name: t for name, t in tensors.items() if not name.endswith("side")}, folder / "kv.safetensors")
    with pytest.raises(PermpruneError, match="lacks tensors of the mean"):
        read_channels(folder, read_record(folder))


def test_a_limit_of_the_loss_gives_the_fewest_bytes(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    text = ("--data", tiny_text, "--windows", "2", "--length", "64", "--calibration", tiny_text, "--samples", "4")
    budgets = []
    for limit in ("0.01%", "50%"):
        out = tmp_path / f"kv {limit}"
        code, said, _ = run("kv", tiny_checkpoint, "--out", out, *text, "--window", "8", "--max-loss", limit)
        assert code == 0 and said.count("perplexity") == 2 and "held out" in said
        record = read_record(out)
        assert record.chosen is not None and record.budget is not None
        assert record.chosen.lost <= float(limit[:-1]) / 100
        budgets.append(record.budget)
    assert budgets[0] > budgets[1]
