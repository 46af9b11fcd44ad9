"""Mixtures of experts in folders: written, offloaded, trained and packed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import permprune
from permprune.checkpoints.io import load, read_model
from permprune.checkpoints.record import read_record
from permprune.checkpoints.weights import GATHERED
from permprune.config import PruneConfig
from permprune.engine.measuring import Evaluation
from permprune.errors import PermpruneError
from permprune.jobs.finetune import FineTuning, finetune
from permprune.jobs.packing import pack_folder, unpack_folder
from permprune.jobs.prune import prune_to_folder
from permprune.jobs.verify import verify
from permprune.models.layers import block_linears
from permprune.pattern import Pattern
from permprune.pruning.folder import save

from ..coupling.coupling_models import gpt_oss, mixtral, qwen3_moe, randomised
from ..held_bytes import Held

pytestmark = pytest.mark.slow

FAMILIES = {"mixtral": mixtral, "qwen3-moe": qwen3_moe, "gpt-oss": gpt_oss}
SETTINGS = PruneConfig(length=16, samples=40, measured=16, held_out=4, precision="fp32", batch=16)
"""Few enough windows that the statistics come of one batch."""


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def written(family: str, blocks: int, folder: Path, tokenizer: tf.PreTrainedTokenizerFast) -> Path:
    """A checkpoint in bf16, as Transformers writes it."""
    model: Any = randomised(FAMILIES[family](vocab_size=128, num_hidden_layers=blocks))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def source(family: str, tmp_path: Path, tiny_tokenizer: tf.PreTrainedTokenizerFast) -> Path:
    """A checkpoint of 20 layers."""
    return written(family, 2, tmp_path / "source", tiny_tokenizer)


def run(source: Path, out: Path, text: Path, **settings: Any) -> dict[str, Any]:
    chosen = SETTINGS.replace(calibration=str(text), **settings)
    return prune_to_folder(str(source), out, chosen, evaluation=Evaluation(str(text), 4, 16)).to_json()


@pytest.mark.parametrize("mode", ["fold", "gather"])
def test_a_folder_loads_and_holds_the_pattern(source: Path, mode: str, tiny_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out, tiny_text, order="random", mode=mode, seed=1)
    assert verify(out).layers == 20
    assert (out / GATHERED).exists() == (mode == "gather")
    model = load(out)
    layers = [layer for layer in block_linears(model) if layer.expert is not None]
    assert len(layers) == 2 * 6 and all(Pattern(2, 4).holds(layer.weight) for layer in layers)
    if mode == "fold":
        plain = tf.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        ids = torch.arange(16)[None]
        torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    save(model, tmp_path / "again")
    assert verify(tmp_path / "again").difference < 0.1
    with torch.no_grad():
        layers[5].stored.fill_(1)
    with pytest.raises(PermpruneError, match=r"experts\.\d\.down_proj is not 2:4 in stored order"):
        verify(model)


@pytest.mark.parametrize(
    ("family", "mode", "recipe"),
    [
        ("mixtral", "fold", {"order": "ria"}),
        ("mixtral", "gather", {"order": "random"}),
        ("qwen3-moe", "gather", {"order": "newton:rounds=1", "train": "steps=1:blocks=true"}),
        ("gpt-oss", "fold", {"order": "ria"}),
    ],
    indirect=["family"],
)
def test_experts_that_are_offloaded_are_pruned_alike(
    source: Path, mode: str, recipe: dict[str, str], tiny_text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = (
        run(source, tmp_path / place, tiny_text, **recipe, mode=mode, offload=place) for place in ("none", "disk")
    )
    assert caplog.text.count("experts read fewer than") == 2
    for key in ("permutations", "layers", "measured"):
        assert other[key] == one[key]
    assert {gather["site"]: gather for gather in other["gathers"]} == {one["site"]: one for one in one["gathers"]}
    weights = [load(tmp_path / place).state_dict() for place in ("none", "disk")]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())
    assert verify(tmp_path / "disk").layers == 20


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"], indirect=True)
def test_offloaded_experts_take_what_was_forecast(source: Path, tiny_text: Path, tmp_path: Path) -> None:
    settings: Any = {"order": "ria", "mode": "gather", "recompute": True, "offload": "disk"}
    found = permprune.forecast(str(source), SETTINGS.replace(**settings), windows=4)
    with Held() as held:
        run(source, tmp_path / "out", tiny_text, **settings)
    assert held.peak == pytest.approx(found.tensors, rel=0.25)


@pytest.mark.parametrize("family", ["mixtral"], indirect=True)
def test_training_keeps_the_pattern(
    source: Path, tiny_text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    run(source, out, tiny_text, order="none")
    options = FineTuning(str(tiny_text), epochs=1, rows=16, length=16, lr=1e-2, teacher=str(source))
    finetune(str(out), tmp_path / "tuned", options)
    assert verify(tmp_path / "tuned").layers == 20
    old, new = (dict(load(folder).named_parameters()) for folder in (out, tmp_path / "tuned"))
    for name, weight in old.items():
        if weight.dim() == 3:
            assert torch.equal(weight == 0, new[name] == 0) and not torch.equal(weight, new[name])
    finetune(str(out), tmp_path / "packed", replace(options, pack="bf16", train="norms"))
    assert "of a type that has no packed form" in caplog.text and "experts.*.down_proj" in caplog.text


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"], indirect=True)
def test_packing_leaves_experts_dense_and_says_so(source: Path, tiny_text: Path, tmp_path: Path) -> None:
    out, packed = tmp_path / "out", tmp_path / "packed"
    run(source, out, tiny_text, order="random")
    found = pack_folder(out, packed)
    experts = "model.layers.*.mlp.experts.*"
    assert found.left_dense == [f"{experts}.gate_up_proj", f"{experts}.down_proj"]
    assert found.layers.packed - found.layers.dense == found.weights.packed - found.weights.dense
    assert verify(packed).layers == 20
    unpack_folder(packed, tmp_path / "unpacked")
    assert verify(tmp_path / "unpacked").layers == 20
    run(source, tmp_path / "gathered", tiny_text, order="random", mode="gather")
    with pytest.raises(PermpruneError, match=r"experts.* has a channel order.*prune in fold mode"):
        pack_folder(tmp_path / "gathered", tmp_path / "no")


@pytest.mark.parametrize("family", ["qwen3-moe"], indirect=True)
def test_a_pruned_folder_is_pruned_again(source: Path, tiny_text: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "one", tiny_text, order="random", mode="gather")
    run(tmp_path / "one", tmp_path / "two", tiny_text, order="random", mode="gather", pattern="1:4")
    assert verify(tmp_path / "two").layers == 20
    assert {row.pattern for row in read_record(tmp_path / "two").layers} == {"1:4"}
    assert read_model(str(tmp_path / "two"))[2] == torch.bfloat16
