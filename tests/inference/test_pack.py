"""Packed models: they say what the pruned ones say, and go to files and back through Transformers."""

import copy
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperForConditionalGeneration,
    pipeline,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import permprune
from permprune.checkpoints.gathers import Gather, attach_gathers
from permprune.checkpoints.origin import Origin, linear_layers, set_origin
from permprune.checkpoints.weights import PACKED_WEIGHTS
from permprune.errors import PermpruneError
from permprune.evaluation.size import stored_bytes
from permprune.inference.pack import layer_bytes, other_bytes, pack, unpack
from permprune.kernels.elementwise.module import NativeLayer
from permprune.kernels.product.int8 import Int8Linear, Int8Table
from permprune.kernels.product.module import PackedLinear
from permprune.kernels.product.packed import PackedWeight
from permprune.models.layers import prunable_layers
from permprune.pattern import Pattern
from tests import vision_language

DTYPES = ["fp32", "bf16", "fp16", "int8", "int4"]
CLOSE = {"fp32": 1e-5, "bf16": 0.05, "fp16": 5e-3, "int8": 0.05, "int4": 0.4}
"""How far outputs may be from those of the model with zeros, beside the largest."""


def prune_to(model: PreTrainedModel, text: str = "2:4") -> dict[str, str]:
    """Set the smallest weights of every linear inside the blocks to zero, and name them."""
    pattern = Pattern.parse(text)
    layers = prunable_layers(model, pattern)
    for layer in layers:
        layer.weight.mul_(pattern.mask(layer.weight.abs()))
    return {layer.name: text for layer in layers}


@torch.no_grad()
def say(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    output: Tensor = model(**inputs)[0].float()
    return output


def assert_close(found: Tensor, expected: Tensor, dtype: str) -> None:
    assert float((found - expected).abs().max()) <= CLOSE[dtype] * float(expected.abs().max())


TOKENS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_model_says_what_the_pruned_one_says(tiny_llama: LlamaForCausalLM, dtype: str, tmp_path: Path) -> None:
    patterns = prune_to(tiny_llama)
    expected = say(tiny_llama, input_ids=TOKENS)
    assert pack(tiny_llama, patterns, dtype=dtype) == []
    found = say(tiny_llama, input_ids=TOKENS)
    assert_close(found, expected, dtype)
    tiny_llama.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(say(loaded, input_ids=TOKENS), found)
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / PACKED_WEIGHTS) for name in ("packed", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)
    unpack(loaded)
    assert not any(isinstance(module, PackedLinear) for module in loaded.modules())
    assert_close(say(loaded, input_ids=TOKENS), found, dtype)
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(
        say(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), input_ids=TOKENS), say(loaded, input_ids=TOKENS)
    )


def test_layers_are_native_after_loading_and_training(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    pack(tiny_llama, prune_to(tiny_llama), dtype="fp32")
    tiny_llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for model in (tiny_llama, loaded, loaded.train(), loaded.eval()):
        norms = [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]
        assert norms and all(isinstance(norm, NativeLayer) and "forward" not in vars(norm) for norm in norms)


def test_greedy_continuations_and_pipelines(tiny_llama: LlamaForCausalLM, tiny_tokenizer: Any, tmp_path: Path) -> None:
    patterns = prune_to(tiny_llama)
    expected = tiny_llama.generate(TOKENS, max_new_tokens=20, do_sample=False)
    pack(tiny_llama, patterns, dtype="fp32")
    tiny_llama.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(TOKENS, max_new_tokens=20, do_sample=False), expected)
    generate = pipeline("text-generation", model=str(tmp_path), tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    assert generate("the order", max_new_tokens=3, do_sample=False)[0]["generated_text"]


def test_conv1d_of_gpt2(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()
    patterns = prune_to(model, "4:8")
    nn.init.normal_(model.transformer.h[0].mlp.c_fc.bias)
    expected = say(model, input_ids=TOKENS)
    weight = model.transformer.h[0].mlp.c_fc.weight.clone()
    pack(model, patterns, dtype="fp32")
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, weight)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(say(loaded, input_ids=TOKENS), expected, "fp32")
    unpack(loaded)
    assert_close(say(loaded, input_ids=TOKENS), expected, "fp32")


def test_models_that_ask_for_the_type_of_a_weight_do_not_unpack_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model = T5ForConditionalGeneration(config).eval()
    patterns, inputs = prune_to(model), {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    weight, expected = model.encoder.block[0].layer[1].DenseReluDense.wo.weight, say(model, **inputs)
    pack(model, patterns, dtype="fp32")
    unpacked = Mock(wraps=PackedWeight.unpack)
    monkeypatch.setattr(PackedWeight, "unpack", lambda *given: unpacked(*given))
    assert_close(say(model, **inputs), expected, "fp32")
    name = "encoder.block.0.layer.1.DenseReluDense.wo"
    assert linear_layers(model)[name].shape == weight.shape and not unpacked.called
    assert torch.equal(model.get_submodule(name).weight, weight) and unpacked.call_count == 1


def test_encoders(tiny_bert: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert).eval()
    pack(model, prune_to(model), dtype="bf16")
    expected = say(model, input_ids=TOKENS)
    model.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert torch.equal(say(loaded, input_ids=TOKENS), expected)
    base = AutoModel.from_pretrained(tmp_path / "packed")  # without the head, whose names have a prefix
    assert isinstance(base.encoder.layer[0].attention.self.query, PackedLinear)
    assert torch.equal(say(base, input_ids=TOKENS), say(loaded.bert, input_ids=TOKENS))


def test_vision_and_speech(tiny_vit: Path, tiny_whisper: Path, tmp_path: Path) -> None:
    cases: list[tuple[Any, Path, dict[str, Tensor]]] = [
        (permprune.load, tiny_vit, {"pixel_values": torch.rand(1, 3, 16, 16)}),
        (
            None,
            tiny_whisper,
            {"input_features": torch.rand(1, 8, 100), "decoder_input_ids": torch.tensor([[1, 2]])},
        ),
    ]
    for _, folder, inputs in cases:
        model, _, _ = permprune.read_model(str(folder))
        pack(model, prune_to(model), dtype="fp32")
        expected = say(model, **inputs)
        out = tmp_path / f"{folder.name}-packed"
        model.save_pretrained(out)
        loaded, _, _ = permprune.read_model(str(out))
        assert any(isinstance(module, PackedLinear) for module in loaded.modules())
        assert torch.equal(say(loaded, **inputs), expected)
    assert isinstance(loaded, WhisperForConditionalGeneration)


def test_orders_go_into_the_kernels(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    patterns = prune_to(tiny_llama)
    name = "model.layers.1.mlp.down_proj"
    expected = say(tiny_llama, input_ids=TOKENS)
    layer = tiny_llama.get_submodule(name)
    order = torch.arange(64).view(-1, 4).flip(0).flatten()
    layer.weight.data = layer.weight.data[:, order]
    attach_gathers(tiny_llama, [Gather("site", "", [name], order.tolist())])
    pack(tiny_llama, patterns, dtype="fp32")
    assert_close(say(tiny_llama, input_ids=TOKENS), expected, "fp32")
    tiny_llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_submodule(name).order, order)
    unpack(loaded)
    assert_close(say(loaded, input_ids=TOKENS), expected, "fp32")


def test_a_layer_follows_its_tensors(tiny_llama: LlamaForCausalLM) -> None:
    pack(tiny_llama, prune_to(tiny_llama), dtype="fp32")
    layer = tiny_llama.model.layers[0].mlp.up_proj
    x = torch.randn(3, 32)
    first = layer(x)
    other = copy.deepcopy(layer)
    other.packed.values.mul_(2)
    assert torch.allclose(other(x), 2 * first, atol=1e-5)
    assert torch.equal(layer(x), first)
    layer.half()  # converts activations and bias, but not what is stored
    assert layer(x.half()).dtype == torch.float16
    assert torch.allclose(layer(x.half()).float(), first, atol=1e-2) and torch.equal(layer(x), first)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_pass_through_a_packed_model(tiny_llama: LlamaForCausalLM, compiled: bool) -> None:
    patterns, other = prune_to(tiny_llama), copy.deepcopy(tiny_llama)
    pack(tiny_llama, patterns, dtype="fp32")
    run = torch.compile(tiny_llama, backend="aot_eager") if compiled else tiny_llama
    for model in (run, other):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    dense = dict(other.named_parameters())
    trained = {name: parameter for name, parameter in tiny_llama.named_parameters() if parameter.requires_grad}
    assert {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"} <= trained.keys()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, dense[name].grad, rtol=1e-3, atol=1e-4)


def test_a_trainer_trains_adapters_on_a_packed_model(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """As PEFT does: the model is frozen, and layers are wrapped."""
    pack(tiny_llama, prune_to(tiny_llama), dtype="bf16")
    before = copy.deepcopy(tiny_llama.state_dict())
    tiny_llama.requires_grad_(False)
    for block in tiny_llama.model.layers:
        block.mlp.up_proj = Adapted(block.mlp.up_proj)
    optimizer = torch.optim.Adam([p for p in tiny_llama.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(20):
        loss = tiny_llama(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    after = {name.replace(".base.", "."): tensor for name, tensor in tiny_llama.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


class Adapted(nn.Module):
    """A layer with a low-rank adapter, as LoRA has it."""

    def __init__(self, base: PackedLinear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False, dtype=torch.bfloat16)
        self.up = nn.Linear(4, base.out_features, bias=False, dtype=torch.bfloat16)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


def test_a_failure_leaves_the_model_as_it_was(tiny_llama: LlamaForCausalLM) -> None:
    patterns = prune_to(tiny_llama)
    name, wide = list(patterns)[4], "model.layers.1.mlp.down_proj"
    weight = tiny_llama.get_submodule(name).weight.data
    order = list(reversed(range(weight.shape[1])))
    attach_gathers(tiny_llama, [Gather("site", "", [name], order)])
    expected, state = say(tiny_llama, input_ids=TOKENS), copy.deepcopy(tiny_llama.state_dict())
    damages: list[tuple[Any, dict[str, Any], str]] = [
        (lambda: weight.fill_(1), {}, f"{name}: a weight to pack does not hold 2:4"),
        (lambda: weight[0].fill_(torch.nan), {}, f"{name}: a weight to pack is NaN"),
        (lambda: weight[0, 0].fill_(1e6), {"dtype": "fp16"}, f"{name}: a weight to pack is too large for float16"),
        (
            lambda: tiny_llama.get_submodule(wide).weight.data.fill_(torch.nan),
            {"dtype": "int8", "patterns": {**patterns, wide: "dense"}},
            f"{wide}: a weight to be int8 is NaN",
        ),
        (lambda: None, {"head": "int8"}, "rows of 32 channels cannot be int8"),
        (lambda: None, {"patterns": {**patterns, name: "x"}}, "is not an N:M pattern"),
        (lambda: None, {"patterns": {**patterns, name: "5:24"}}, "M is at most 16"),
        (lambda: None, {"patterns": {**patterns, "model.layers.7": "2:4"}}, "has no linear layer model.layers.7"),
        (lambda: None, {"patterns": {n: p for n, p in patterns.items() if n != name}}, f"{name} has a channel order"),
    ]
    for damage, options, words in damages:
        damage()
        with pytest.raises(PermpruneError, match=words):
            pack(tiny_llama, **{"patterns": patterns, "dtype": "fp32", **options})
        tiny_llama.load_state_dict(state)
        assert not any(isinstance(module, PackedLinear) for module in tiny_llama.modules())
        assert torch.equal(say(tiny_llama, input_ids=TOKENS), expected)
    pack(tiny_llama, patterns, dtype="fp32")
    assert_close(say(tiny_llama, input_ids=TOKENS), expected, "fp32")
    with pytest.raises(PermpruneError, match="unpack them first"):
        pack(tiny_llama, patterns)


def test_falcon_whose_layers_are_a_subclass(tmp_path: Path) -> None:
    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = FalconForCausalLM(config).eval()
    patterns = prune_to(model)
    expected = say(model, input_ids=TOKENS)
    assert patterns and pack(model, patterns, dtype="fp32") == []
    assert_close(say(model, input_ids=TOKENS), expected, "fp32")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(isinstance(module, PackedLinear) for module in loaded.modules()) == len(patterns)
    assert_close(say(loaded, input_ids=TOKENS), expected, "fp32")
    unpack(loaded)
    assert_close(say(loaded, input_ids=TOKENS), expected, "fp32")


def test_what_cannot_be_packed(tiny_llama: LlamaForCausalLM) -> None:
    patterns = {"model.layers.0.mlp.up_proj": "2:4"}
    with pytest.raises(PermpruneError, match=r"layers.0.mlp.up_proj: a weight to pack does not hold 2:4"):
        pack(tiny_llama, patterns)
    with pytest.raises(PermpruneError, match='as "fp8": choose fp32, bf16'):
        pack(tiny_llama, patterns, dtype="fp8")
    with pytest.raises(PermpruneError, match="no layer to pack"):
        pack(tiny_llama, {})
    with pytest.raises(PermpruneError, match="is not packed"):
        unpack(tiny_llama)

    tiny_llama.lm_head.weight = tiny_llama.model.embed_tokens.weight
    with pytest.raises(PermpruneError, match=r"lm_head shares its weight with model.embed_tokens.weight"):
        pack(tiny_llama, {"lm_head": "2:4"})

    class Clipped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clamp(-1000, 1000))

    clipped, name = Clipped(32, 64, bias=False), "model.layers.0.mlp.up_proj"
    tiny_llama.model.layers[0].mlp.up_proj = clipped
    patterns = prune_to(tiny_llama)
    with pytest.raises(PermpruneError, match=r"no layer to pack.*a Clipped has no packed form"):
        pack(tiny_llama, {name: patterns[name]})
    assert pack(tiny_llama, patterns, dtype="fp32") == [name]
    assert tiny_llama.model.layers[0].mlp.up_proj is clipped


def _damage_config(**changes: Any) -> Any:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] |= changes
        path.write_text(json.dumps(config))

    return damage


def _damage_blocks(change: Any) -> Any:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / PACKED_WEIGHTS)
        name = "model.layers.1.mlp.down_proj.blocks"
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed
        save_file(tensors, folder / PACKED_WEIGHTS, {"format": "pt"})

    return damage


def _with_nan(blocks: Tensor) -> Tensor:
    blocks[0, 8:12] = torch.tensor([torch.nan]).view(torch.uint8)
    return blocks


DAMAGES: dict[str, tuple[Any, str]] = {
    "codes of ones": (_damage_blocks(torch.ones_like), "down_proj does not keep 2:4 in row 0"),
    "blocks left out": (_damage_blocks(lambda blocks: None), "lacks model.layers.1.mlp.down_proj.blocks"),
    "a scale that is NaN": (_damage_blocks(_with_nan), "scale that is NaN"),
    "rows too short": (_damage_blocks(lambda blocks: blocks[:, 1:].clone()), "does not load|do not fit"),
    "another pattern": (_damage_config(layers={"model.layers.1.mlp.down_proj": "1:4"}), "does not load|do not fit"),
    "a pattern that is none": (_damage_config(layers={"model.layers.1.mlp.down_proj": "x"}), "is not an N:M pattern"),
    "a layer that is not there": (_damage_config(layers={"model.layers.7.mlp.down_proj": "2:4"}), "does not have"),
    "an embedding": (_damage_config(layers={"model.embed_tokens": "2:4"}), "but a Embedding in the model"),
    "another dtype": (_damage_config(dtype="load"), "quantization_config is damaged"),
    "int4 of an earlier format": (
        _damage_config(dtype="int4"),
        "has format 1, not 2: pack the folder that it was made",
    ),
    "a newer format": (_damage_config(version=2), "install a permprune that reads it"),
    "an unknown key": (_damage_config(color="red"), "color"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_are_refused_in_one_line(name: str, tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    pack(tiny_llama, prune_to(tiny_llama), dtype="int8")
    tiny_llama.save_pretrained(tmp_path)
    damage, words = DAMAGES[name]
    damage(tmp_path)
    with pytest.raises(PermpruneError, match=words) as caught:
        permprune.read_model(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_embedding_and_head_in_int8(tiny_llama: LlamaForCausalLM, tmp_path: Path, dtype: str, tied: bool) -> None:
    config = copy.deepcopy(tiny_llama.config)
    config.hidden_size, config.tie_word_embeddings = 64, tied
    model = LlamaForCausalLM(config).eval()
    patterns = prune_to(model)
    expected, whole = say(model, input_ids=TOKENS), model.get_input_embeddings().weight.detach().clone()
    pack(model, patterns, dtype=dtype, head="int8")
    found = say(model, input_ids=TOKENS)
    assert_close(found, expected, "int8")
    assert model.get_input_embeddings().values.dtype == torch.int8
    model.save_pretrained(tmp_path / "packed")
    names = set(load_file(tmp_path / "packed" / PACKED_WEIGHTS))
    assert {"model.embed_tokens.values", "model.embed_tokens.scale"} <= names
    assert ("lm_head.values" in names) == (not tied) and not any(name.endswith("embed_tokens.weight") for name in names)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(say(loaded, input_ids=TOKENS), found)
    base = AutoModel.from_pretrained(tmp_path / "packed")  # without the head
    assert torch.equal(say(base, input_ids=TOKENS), say(loaded.model, input_ids=TOKENS))
    many = torch.arange(80).view(1, 80)  # more rows than the kernels take
    assert torch.isfinite(say(loaded, input_ids=many)).all()
    assert len(loaded.generate(TOKENS[:1], max_new_tokens=3, do_sample=False)[0]) == TOKENS.shape[1] + 3
    unpack(loaded)
    weight = loaded.get_input_embeddings().weight.detach()
    assert (loaded.get_output_embeddings().weight.data_ptr() == weight.data_ptr()) == tied
    assert float((weight.float() - whole).abs().max()) <= float(whole.abs().max()) / 127
    assert_close(say(loaded, input_ids=TOKENS), found, "int8")


@pytest.mark.parametrize("name", vision_language.MODELS)
def test_a_tied_head_of_a_vision_language_model_in_int8(name: str, tmp_path: Path) -> None:
    drawn = vision_language.MODELS[name]()[0]
    config = drawn.config
    config.text_config.hidden_size, config.text_config.num_attention_heads = 64, 8
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = type(drawn)(config).float().eval()
    pack(model, prune_to(model), dtype="fp32", head="int8")
    found = say(model, input_ids=TOKENS)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(say(loaded, input_ids=TOKENS), found)
    unpack(loaded)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    loaded.save_pretrained(tmp_path / "unpacked")
    assert_close(say(type(model).from_pretrained(tmp_path / "unpacked"), input_ids=TOKENS), found, "int8")


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", [LlamaForCausalLM, GPT2LMHeadModel])
def test_dense_layers_of_a_mix(tiny_llama: LlamaForCausalLM, tmp_path: Path, kind: type, dtype: str) -> None:
    config = copy.deepcopy(tiny_llama.config)
    config.hidden_size, config.intermediate_size = 64, 96
    if kind is GPT2LMHeadModel:
        config = GPT2Config(vocab_size=config.vocab_size, n_embd=64, n_inner=96, n_layer=2, n_head=2)
    model = kind(config).eval()
    layers = prunable_layers(model, Pattern.parse("2:4"))
    narrow = {layer.name for layer in layers if layer.weight.shape[1] % 64}
    dense = {*(layer.name for layer in layers[::3]), *narrow}
    patterns = {name: text for name, text in prune_to(model).items() if name not in dense}
    expected, before = say(model, input_ids=TOKENS), {name: type(model.get_submodule(name)) for name in dense}
    own = [layer_bytes(model, one, patterns.get(one.name) and Pattern(2, 4), dtype=dtype) for one in layers]
    size = sum(own) + other_bytes(model, layers, dtype=dtype)
    left = pack(model, patterns | dict.fromkeys(dense, "dense"), dtype=dtype)
    assert stored_bytes(model) == size
    tables = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert {*left} == (narrow if dtype != "bf16" else set())
    assert tables == (dense - narrow if dtype != "bf16" else set()) and dense > narrow
    found = say(model, input_ids=TOKENS)
    assert_close(found, expected, dtype)
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert torch.equal(say(loaded, input_ids=TOKENS), found)
    unpack(loaded)
    assert {name: type(loaded.get_submodule(name)) for name in dense} == before
    assert_close(say(loaded, input_ids=TOKENS), found, "int8")


def test_heads_that_cannot_be_int8_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    patterns = prune_to(tiny_llama)
    with pytest.raises(PermpruneError, match='the head cannot be "int4"'):
        pack(copy.deepcopy(tiny_llama), patterns, head="int4")
    with pytest.raises(PermpruneError, match="rows of 32 channels cannot be int8: 64 does not divide them"):
        pack(tiny_llama, patterns, head="int8")


def test_the_head_is_the_operator_that_torch_knows() -> None:
    table = Int8Linear.pack(torch.randn(10, 64))
    torch.library.opcheck(torch.ops.permprune.int8_linear, (torch.randn(3, 64), table.values, table.scale, None))
    for batch in (1, 64, 65):
        x = torch.randn(batch, 64)
        torch.testing.assert_close(table(x), x @ table.weight.T, rtol=0.05, atol=0.3)


def test_an_int8_head_follows_conversions_of_the_model(tiny_llama: LlamaForCausalLM) -> None:
    for tied in (True, False):
        config = copy.deepcopy(tiny_llama.config)
        config.hidden_size, config.tie_word_embeddings = 64, tied
        model = LlamaForCausalLM(config).eval()
        pack(model, prune_to(model), dtype="fp32", head="int8")
        found, scale = say(model, input_ids=TOKENS), model.get_input_embeddings().scale.clone()
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            model.to(dtype)
            assert model(input_ids=TOKENS).logits.dtype == dtype
            assert_close(say(model, input_ids=TOKENS), found, "bf16")
            assert torch.equal(model.get_input_embeddings().scale, scale)
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()


def test_scales_stay_fp32_beside_bf16(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    config = copy.deepcopy(tiny_llama.config)
    config.hidden_size = 64
    model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    pack(model, prune_to(model), dtype="int8", head="int8")
    found = say(model, input_ids=TOKENS)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    scales = [module.scale for module in loaded.modules() if isinstance(module, Int8Table)]
    assert loaded.dtype == torch.bfloat16 and {scale.dtype for scale in scales} == {torch.float32}
    assert_close(say(loaded, input_ids=TOKENS), found, "bf16")


def test_modules_that_transformers_keeps_in_fp32_stay_so(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (norm := tiny_llama.model.norm).weight.data.fill_(1 + 2**-12)  # bf16 does not have it
    narrow = other_bytes(tiny_llama, [])
    for one in (LlamaForCausalLM, tiny_llama):  # a model has a copy
        monkeypatch.setattr(one, "_keep_in_fp32_modules_strict", {"model.norm"})
    assert other_bytes(tiny_llama, []) == narrow + 2 * norm.weight.numel()
    set_origin(tiny_llama, Origin("tiny", torch.bfloat16, None))
    pruned = permprune.prune(tiny_llama, examples=TOKENS.view(4, 5), order="ria")
    permprune.save(tiny_llama, tmp_path / "pruned")
    pack(tiny_llama, {row.name: row.pattern for row in pruned.layers}, dtype="bf16")
    tiny_llama.save_pretrained(tmp_path / "packed")
    for folder in ("pruned", "packed"):
        weight = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="bfloat16").model.norm.weight
        assert weight.dtype == torch.float32 and torch.equal(weight, norm.weight) and weight[0] == 1 + 2**-12
