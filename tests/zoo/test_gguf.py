import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from permprune.zoo import gguf
from permprune.zoo.gguf import convert

TOKENS = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "he", "<|endoftext|>"]
SHAPE = {"vocab_size": len(TOKENS), "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
QUANTIZED = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
"""Widths that the blocks of 256 weights of Q4_K and Q6_K divide."""

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, **QUANTIZED, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, **QUANTIZED, tie_word_embeddings=False)),
}


def _write(file: Path, architecture: str, model: PreTrainedModel, *, quantized: bool) -> None:
    """Write a GGUF file with the parameters of a model in fp32 or, if `quantized`, with random ones as in Q4_K_M."""
    writer = GGUFWriter(file, architecture)
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.NORMAL] * (len(TOKENS) - 1) + [TokenType.CONTROL])
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(len(TOKENS) - 1)
    writer.add_eos_token_id(len(TOKENS) - 1)
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(numbers[architecture], config.num_hidden_layers)
    generator = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        stored = names.get_name(name, (".weight", ".bias"))
        if not quantized:
            writer.add_tensor(stored, parameter.detach().numpy())
        elif parameter.dim() == 1:
            writer.add_tensor(stored, generator.standard_normal(parameter.shape, np.float32))
        else:
            kind = "Q6_K" if "ffn_down" in stored else "Q4_K"
            blocks = _blocks(generator, kind, parameter.shape)
            writer.add_tensor(stored, blocks, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _blocks(generator: np.random.Generator, kind: str, shape: torch.Size) -> np.ndarray:
    """Random bytes (rows, bytes of a row); the fp16 scales of a block lie between 0.01 and 0.02."""
    size, scales = {"Q4_K": (144, slice(0, 4)), "Q6_K": (210, slice(208, 210))}[kind]
    blocks = generator.integers(256, size=(shape[0], shape[1] // 256, size), dtype=np.uint8)
    count = (scales.stop - scales.start) // 2
    drawn = generator.uniform(0.01, 0.02, (*blocks.shape[:2], count)).astype(np.float16)
    blocks[..., scales] = drawn.view(np.uint8)
    return blocks.reshape(len(blocks), -1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "converted"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("count", [1, 3])
def test_a_file_in_parts(count, tmp_path, folder):
    qwen2 = Qwen2ForCausalLM(Qwen2Config(**SHAPE, hidden_size=32, intermediate_size=48, tie_word_embeddings=True))
    source = tmp_path / "source"
    source.mkdir()
    _write(tmp_path / "package.gguf", "qwen2", qwen2, quantized=False)
    whole = (tmp_path / "package.gguf").read_bytes()
    step = len(whole) // count + 1
    parts = [source / f"part{number}" for number in range(count)]
    for number, part in enumerate(parts):
        part.write_bytes(whole[number * step : (number + 1) * step])
    convert(parts, folder)
    assert [path.name for path in source.iterdir()] == ["model.gguf"]
    converted = AutoModelForCausalLM.from_pretrained(folder)
    assert type(converted) is Qwen2ForCausalLM
    assert converted.get_input_embeddings().weight is converted.get_output_embeddings().weight
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, qwen2.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(folder)("hello").input_ids[:3] == [27, 11, 11]


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_that_transformers_reads(architecture, dtype, tmp_path, folder, monkeypatch):
    monkeypatch.setattr(gguf, "CHUNK", 1000)
    monkeypatch.setattr(gguf, "SHARD", 2**20)
    source = tmp_path / "source"
    source.mkdir()
    _write(source / "package.gguf", architecture, MODELS[architecture](), quantized=True)
    expected = AutoModelForCausalLM.from_pretrained(source, gguf_file="package.gguf", dtype=dtype)
    convert([source / "package.gguf"], folder, dtype)
    actual = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert type(actual) is type(expected)
    assert actual.dtype == dtype
    weights = expected.state_dict()
    assert actual.state_dict().keys() == weights.keys()
    for name, weight in actual.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    files = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert files == {file.name for file in folder.glob("*.safetensors")}
    assert len(files) > 1


def test_an_unknown_architecture(tmp_path, folder):
    _write(tmp_path / "package.gguf", "qwen3", MODELS["qwen2"](), quantized=True)
    with pytest.raises(ValueError, match=r"no conversion of qwen3 from GGUF, only of llama, qwen2"):
        convert([tmp_path / "package.gguf"], folder)
    assert not list(folder.iterdir())
