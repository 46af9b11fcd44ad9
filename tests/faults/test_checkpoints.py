"""Checkpoints with a fault: each command says in one line which file or weight is at fault, and writes nothing."""

import json
import pickle as pickling
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from permprune import PermpruneError, load, prune, read_model
from permprune.checkpoints.offload import read_offloaded
from permprune.checkpoints.weights import GATHERED
from permprune.zoo.models import MODELS

from ..cli.running import fails, run
from ..coupling.coupling_models import FAMILIES, mixtral
from ..fixtures import BLOCK, SENTENCES, make_tiny_llama
from ..modalities import images, vit_config

OFFLOADED = "prune offloaded"
COMMANDS = ("prune", OFFLOADED, "compare", "inspect", "verify", "evaluate")
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer_config.json"
BIN = "pytorch_model.bin"
UP = "model.layers.1.mlp.up_proj.weight"
PICKLE = pickling.dumps({"a": 1})
BIAS = {"model.norm.bias": torch.ones(32)}

SMALL = ("--samples", "6", "--length", "16", "--windows", "1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: tf.PreTrainedTokenizerFast) -> Path:
    """A folder that permprune wrote, which every command reads."""
    return written(tmp_path_factory.mktemp("fold"), tiny_tokenizer)


@pytest.fixture(scope="module")
def whole_gathered(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: tf.PreTrainedTokenizerFast) -> Path:
    return written(tmp_path_factory.mktemp("gather"), tiny_tokenizer, "--mode", "gather")


def written(folder: Path, tokenizer: tf.PreTrainedTokenizerFast, *options: str) -> Path:
    make_tiny_llama().save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    text = folder / "text.txt"
    text.write_text("\n".join(SENTENCES * 9))
    assert run(*arguments("prune", folder / "dense", text), *options)[0] == 0
    return folder / "out"


def arguments(command: str, folder: Path, text: Path) -> list[str | Path]:
    """The command line of a command on a folder, which would write to "out" beside it."""
    out = folder.with_name("out")
    data = ["--calibration", text, "--data", text, *SMALL]
    return {
        "prune": ["prune", folder, "--out", out, "--order", "ria", *data],
        OFFLOADED: ["prune", folder, "--out", out, "--order", "ria", "--set", "offload=disk", *data],
        "compare": ["compare", folder, "--out", out, "--methods", "none", "--patterns", "2:4", *data],
        "inspect": ["inspect", folder],
        "verify": ["verify", folder],
        "evaluate": ["evaluate", folder, "--data", text, "--windows", "1", "--length", "16"],
    }[command]


def change_config(folder: Path, file: str = CONFIG, **values: Any) -> None:
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | values))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], file: str = WEIGHTS) -> None:
    weights = load_file(folder / file)
    change(weights)
    save_file(weights, folder / file, {"format": "pt"})


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def index(folder: Path, content: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(content)


class Malicious:
    """Unpickled by who runs pickles, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.trace,)


def pickle(folder: Path, content: object) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / BIN)


FAULTS: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "weights truncated": (lambda f: cut(f / WEIGHTS, 5000), "model.safetensors is damaged ("),
    "weights empty": (lambda f: cut(f / WEIGHTS, 0), "model.safetensors is damaged ("),
    "weights garbled": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 999), "model.safetensors is damaged ("),
    "weights absent": (lambda f: (f / WEIGHTS).unlink(), "no file named model.safetensors"),
    "config garbled": (lambda f: (f / CONFIG).write_text("{"), "config.json is not valid JSON ("),
    "config empty": (lambda f: (f / CONFIG).write_text(""), "config.json is not valid JSON ("),
    "config of bytes": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "config.json is not valid JSON ("),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), "config.json is not a JSON object"),
    "config nested": (lambda f: (f / CONFIG).write_text("[" * 10**5), "config.json is not valid JSON ("),
    "config of words": (lambda f: change_config(f, num_hidden_layers="two"), "num_hidden_layers"),
    "config of zeros": (lambda f: change_config(f, num_attention_heads=0), "does not load: "),
    "config of a class that is no model": (lambda f: change_config(f, architectures=["LlamaConfig"]), "LlamaConfig"),
    "config of a number for a class": (lambda f: change_config(f, architectures=[5]), "is [5], not a list"),
    "config of a word for classes": (lambda f: change_config(f, architectures="Llama"), "is 'Llama', not a list"),
    "config of 100,000 layers": (lambda f: change_config(f, num_hidden_layers=10**5), "num_hidden_layers is 100000, "),
    "config of an unknown rope": (lambda f: change_config(f, rope_parameters={"rope_type": "b"}), "unknown key 'b'"),
    "config of a type of numbers": (lambda f: change_config(f, dtype="float33"), "does not load: "),
    "index garbled": (lambda f: index(f, "{"), f"{INDEX} is not valid JSON ("),
    "index a list": (lambda f: index(f, "[]"), f"{INDEX} names no files"),
    "index of absent files": (lambda f: index(f, '{"weight_map": {"a": "b.safetensors"}}'), "b.safetensors, which"),
    "tokenizer garbled": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json is not valid JSON ("),
    "tokenizer of words": (lambda f: change_config(f, TOKENIZER, model_max_length="x"), "its tokenizer or processor: "),
    "tokenizer of nothing": (lambda f: (f / "tokenizer.json").write_text("{}"), "its tokenizer or processor: "),
    "pickle of code": (lambda f: pickle(f, {"a": Malicious(f / "trace")}), "contains pickled weights"),
    "pickle of a list": (lambda f: pickle(f, [1]), "contains pickled weights"),
    "pickle of other making": (lambda f: (pickle(f, {}), (f / BIN).write_bytes(PICKLE)), "contains pickled weights"),
    "pickle empty": (lambda f: (pickle(f, {}), cut(f / BIN, 0)), "contains pickled weights"),
    "a weight too few": (lambda f: change_weights(f, lambda w: w.pop(UP)), f"lacks {UP}"),
    "a layer too few": (lambda f: change_config(f, num_hidden_layers=3), "lacks 9 weights (model.layers.2.input"),
    "a layer too many": (lambda f: change_config(f, num_hidden_layers=1), "no place for 9 weights (model.layers.1.inp"),
    "a bias too many": (lambda f: change_weights(f, lambda w: w.update(BIAS)), "no place for model.norm.bias"),
    "a tie undone": (lambda f: change_config(f, tie_word_embeddings=False), "lacks lm_head.weight"),
    "shapes": (lambda f: change_config(f, intermediate_size=128), "down_proj.weight (32, 64) instead of (32, 128), "),
    "a shape beyond memory": (lambda f: change_config(f, vocab_size=10**10), "(128, 32) instead of (10000000000, 32)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_command_says_which_part_of_a_checkpoint_is_at_fault(
    fault: str, whole: Path, tiny_text: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(whole, damaged)
    change, clause = FAULTS[fault]
    change(damaged)
    before = {path: path.stat().st_mtime_ns for path in damaged.iterdir()}
    for command in COMMANDS:
        if command == "verify" and fault.startswith("tokenizer"):  # which it does not read
            continue
        line = fails(*arguments(command, damaged, tiny_text))
        assert line.startswith(f"permprune: {damaged} ") and clause in line, (command, line)
        assert "report" not in line
    assert {path: path.stat().st_mtime_ns for path in damaged.iterdir()} == before
    assert not damaged.with_name("out").exists()


@pytest.mark.parametrize("fault", ["weights truncated", "config garbled", "a weight too few"])
def test_of_a_damaged_cache_each_command_says_how_to_clear_it(
    fault: str, whole: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERMPRUNE_CACHE", str(tmp_path))
    package = next(iter(MODELS["smollm2-135m"].files))
    cached = tmp_path / f"models/smollm2-135m-{package.version}"
    shutil.copytree(whole, cached)
    change, clause = FAULTS[fault]
    change(cached)
    for command in ("prune", "compare", "inspect", "evaluate"):
        line = fails(*arguments(command, Path("smollm2-135m"), tiny_text))
        assert line.startswith("permprune: smollm2-135m does not load: ") and clause in line
        assert line.endswith(f"the cached copy is damaged: delete {cached}, and it will be created again")
    shutil.rmtree(cached)
    shutil.copytree(whole, cached)
    assert run("evaluate", "smollm2-135m", "--data", tiny_text, "--windows", "1", "--length", "16")[0] == 0


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        (lambda w: w.pop(UP), f"lacks {UP}"),
        (lambda w: w.update(BIAS), "no place for model.norm.bias"),
        (lambda w: w.update({UP: torch.ones(8, 32)}), f"other shapes than config.json for {UP} (8, 32) instead of"),
    ],
)
def test_weights_of_a_gathered_model_are_all_there(
    change: Callable[[dict[str, torch.Tensor]], object],
    clause: str,
    whole_gathered: Path,
    tiny_text: Path,
    tmp_path: Path,
) -> None:
    gathered = tmp_path / "gathered"
    shutil.copytree(whole_gathered, gathered)
    change_weights(gathered, change, GATHERED)
    for command in ("inspect", "verify", "evaluate"):
        line = fails(*arguments(command, gathered, tiny_text))
        assert line.startswith(f"permprune: {gathered / GATHERED} does not load: ") and clause in line
    with pytest.raises(PermpruneError, match=re.escape(clause)):
        load(gathered)


def save(model: tf.PreTrainedModel, folder: Path, **config: Any) -> Path:
    model.save_pretrained(folder)
    change_config(folder, **config)
    return folder


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_head_that_the_model_has_not_is_left_out_with_a_warning(
    offloaded: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tf.BertForPreTraining(tf.BertConfig(**BLOCK)), tmp_path / "bert", architectures=["BertForMaskedLM"])
    model = (read_offloaded(str(folder), tmp_path / "offloaded") if offloaded else read_model(str(folder)))[0]
    assert type(model) is tf.BertForMaskedLM
    assert [record.getMessage() for record in caplog.records if record.name == "permprune"] == [
        f"{folder}: a BertForMaskedLM has no place for 4 weights (bert.pooler.dense.bias, bert.pooler.dense.weight, "
        "cls.seq_relationship.bias and 1 more), left out"
    ]


def test_a_pooler_that_the_checkpoint_has_not_is_left_out(tmp_path: Path) -> None:
    """Transformers draws it at random: nothing would be as it was when the model is read again."""
    folder = save(tf.ViTModel(vit_config(), add_pooling_layer=False), tmp_path / "vit", architectures=["ViTModel"])
    model, _, _ = read_model(str(folder))
    assert model.pooler is None
    pixels = images()["pixel_values"]
    again = read_model(str(folder))[0](pixels)
    assert again.pooler_output is None
    assert torch.equal(again.last_hidden_state, model(pixels).last_hidden_state)
    settings = {"mode": "gather", "order": "ria", "examples": {"pixel_values": pixels}}
    assert prune(model, **settings).gathers


def test_constants_of_older_releases_are_no_weights(tmp_path: Path) -> None:
    folder = save(tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)), tmp_path / "gpt2")
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 8, 8) for layer in range(2)}
    change_weights(folder, lambda weights: weights.update(masks))
    assert type(read_model(str(folder))[0]) is tf.GPT2LMHeadModel


@pytest.mark.parametrize(
    ("absent", "clause"),
    [
        ("experts.1.w1", "the checkpoint lacks parts of model.layers.1.mlp.experts.gate_up_proj"),
        ("experts.1.", "2 weights (model.layers.1.mlp.experts.down_proj (2, 32, 48) instead of (3, 32, 48), "),
        ("experts.", "lacks 2 weights (model.layers.1.mlp.experts.down_proj, model.layers.1.mlp.experts.gate_up_proj)"),
    ],
)
@pytest.mark.parametrize("offloaded", [False, True])
def test_experts_that_a_checkpoint_lacks_are_named(absent: str, clause: str, offloaded: bool, tmp_path: Path) -> None:
    folder = save(mixtral(), tmp_path / "mixtral")
    change_weights(
        folder, lambda weights: [weights.pop(key) for key in [*weights] if f"layers.1.block_sparse_moe.{absent}" in key]
    )
    with pytest.raises(PermpruneError, match=re.escape(clause)):
        read_offloaded(str(folder), tmp_path / "offloaded") if offloaded else read_model(str(folder))


def test_pickled_weights_are_read_as_tensors_alone(tiny_checkpoint: Path, tiny_text: Path) -> None:
    expected = run(*arguments("evaluate", tiny_checkpoint, tiny_text))
    pickle(tiny_checkpoint, make_tiny_llama().state_dict())
    assert run(*arguments("evaluate", tiny_checkpoint, tiny_text)) == expected
    line = fails(*arguments(OFFLOADED, tiny_checkpoint, tiny_text))
    assert "pytorch_model.bin contains pickled weights" in line and line.endswith("convert it to safetensors")


@pytest.mark.parametrize("kind", ["tiny_checkpoint", "tiny_bert"])
def test_a_tokenizer_with_tokens_that_the_model_does_not_know_is_refused(
    kind: str, tiny_text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["channels"])
    tokenizer.save_pretrained(folder)
    data = tiny_text
    if kind == "tiny_bert":
        data = tmp_path / "sentences.tsv"
        data.write_text("text\tlabel\n" + "the order of the channels\tyes\nanother text\tno\n" * 9)
    for command in ("prune", "compare", "evaluate"):
        line = fails(*arguments(command, folder, data))
        assert "the tokenizer gives token 128, but the model has 128 tokens" in line
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith("timm") and name != "marian"])
def test_what_a_family_saves_loads_whole(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = cast(tf.PreTrainedModel, FAMILIES[family].build()).float()
    folder = save(model, tmp_path / "model")
    read = read_model(str(folder))[0]
    offloaded, _, _, weights = read_offloaded(str(folder), tmp_path / "offloaded")
    assert type(read) is type(offloaded) is type(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(read.get_parameter(name), parameter) and torch.equal(weights[name], parameter)
    assert not [record for record in caplog.records if record.name == "permprune"]


def test_a_model_that_builds_weights_again_is_not_offloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERMPRUNE_CACHE", str(tmp_path))  # which is not damaged
    folder = save(cast(tf.PreTrainedModel, FAMILIES["marian"].build()).float(), tmp_path / "model")
    assert read_model(str(folder))[0].dtype == torch.float32
    with pytest.raises(
        PermpruneError,
        match=r"whole in memory, since its .* does not store .*embed_positions\.weight: raise .*leave offload out$",
    ):
        read_offloaded(str(folder), tmp_path / "offloaded")
