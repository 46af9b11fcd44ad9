import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, WhisperConfig, WhisperForConditionalGeneration

from permprune.zoo.ctranslate2 import convert_whisper, read_variables

WORDS = {chr(code): code - 97 for code in range(97, 123)}
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", "<|notimestamps|>"]
SETTINGS = {"suppress_ids": [3, 5], "suppress_ids_begin": [26], "alignment_heads": [[0, 1]]}
KINDS = {np.dtype(np.int8): 1, np.dtype(np.int16): 2, np.dtype(np.float16): 4}


def _string(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def _write(file: Path, variables: dict[str, np.ndarray]) -> None:
    parts = [struct.pack("<I", 6), _string("WhisperSpec"), struct.pack("<II", 3, len(variables))]
    for name, array in variables.items():
        parts.append(_string(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape))
        parts.append(struct.pack("<BI", KINDS[array.dtype], array.nbytes) + array.tobytes())
    aliases = struct.pack("<I", 1) + _string("decoder/projection/weight") + _string("decoder/embeddings/weight")
    file.write_bytes(b"".join(parts) + aliases)


def _variables(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """The model's parameters as CTranslate2 stores them: joined by what they read, the bias of keys a zero."""
    variables: dict[str, np.ndarray] = {}

    def put(name: str, *tensors: torch.Tensor) -> None:
        variables[name] = torch.cat(tensors).detach().half().numpy()

    def put_linear(name: str, *linears: torch.nn.Linear) -> None:
        put(f"{name}/weight", *(linear.weight for linear in linears))
        put(f"{name}/bias", *(torch.zeros(16) if linear.bias is None else linear.bias for linear in linears))

    def put_norm(name: str, norm: torch.nn.LayerNorm) -> None:
        put(f"{name}/gamma", norm.weight)
        put(f"{name}/beta", norm.bias)

    for stack in ("encoder", "decoder"):
        own = getattr(model.model, stack)
        variables[f"{stack}/num_heads"] = np.array(2, dtype=np.int16)
        variables[f"{stack}/pre_norm"] = np.array(1, dtype=np.int8)
        put(f"{stack}/position_encodings/encodings", own.embed_positions.weight)
        put_norm(f"{stack}/layer_norm", own.layer_norm)
        for number, layer in enumerate(own.layers):
            at = f"{stack}/layer_{number}"
            put_norm(f"{at}/self_attention/layer_norm", layer.self_attn_layer_norm)
            attention = layer.self_attn
            put_linear(f"{at}/self_attention/linear_0", attention.q_proj, attention.k_proj, attention.v_proj)
            put_linear(f"{at}/self_attention/linear_1", attention.out_proj)
            put_norm(f"{at}/ffn/layer_norm", layer.final_layer_norm)
            put_linear(f"{at}/ffn/linear_0", layer.fc1)
            put_linear(f"{at}/ffn/linear_1", layer.fc2)
    for number, layer in enumerate(model.model.decoder.layers):
        at, attention = f"decoder/layer_{number}/attention", layer.encoder_attn
        put_norm(f"{at}/layer_norm", layer.encoder_attn_layer_norm)
        put_linear(f"{at}/linear_0", attention.q_proj)
        put_linear(f"{at}/linear_1", attention.k_proj, attention.v_proj)
        put_linear(f"{at}/linear_2", attention.out_proj)
    for name in ("conv1", "conv2"):
        put_linear(f"encoder/{name}", getattr(model.model.encoder, name))
    put("decoder/embeddings/weight", model.model.decoder.embed_tokens.weight)
    return variables


@pytest.fixture
def whisper() -> WhisperForConditionalGeneration:
    """A tiny random model whose parameters are fp16 values, stored as fp32."""
    config = WhisperConfig(
        vocab_size=32,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_target_positions=20,
        bos_token_id=26,
        eos_token_id=26,
        pad_token_id=26,
        decoder_start_token_id=27,
    )
    model = WhisperForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn(parameter.shape, generator=generator) / 4).half())
    return model


@pytest.fixture
def files(whisper, tmp_path) -> list[Path]:
    """What a package holds."""
    tokenizer = Tokenizer(models.BPE(vocab=WORDS, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    files = [tmp_path / name for name in ("model.bin", "config.json", "tokenizer.json")]
    _write(files[0], _variables(whisper))
    files[1].write_text(json.dumps(SETTINGS))
    tokenizer.save(str(files[2]))
    return files


@pytest.fixture
def folder(files, tmp_path) -> Path:
    folder = tmp_path / "converted"
    folder.mkdir()
    convert_whisper(files, folder)
    return folder


def test_reads_every_variable(whisper, files):
    expected = _variables(whisper)
    variables = read_variables(files[0])
    assert list(variables) == list(expected)
    for name, array in expected.items():
        assert variables[name].dtype == array.dtype
        np.testing.assert_array_equal(variables[name], array)


@torch.no_grad()
def test_says_what_the_model_said(whisper, folder):
    converted = AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    assert converted.dtype == torch.float32
    features = torch.randn(2, 8, 3000, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[27, 29, 1, 2], [27, 29, 7, 26]])
    expected = whisper(input_features=features, decoder_input_ids=ids).logits
    actual = converted(input_features=features, decoder_input_ids=ids).logits
    torch.testing.assert_close(actual, expected)
    assert expected.std() > 0.1


def test_transcribes_english_with_its_processor(whisper, folder):
    processor = AutoProcessor.from_pretrained(folder)
    converted = AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    sound = np.random.default_rng(0).normal(size=16000)
    inputs = processor(sound, sampling_rate=16000, return_tensors="pt")
    assert inputs.input_features.shape == (1, 8, 3000)
    ids = converted.generate(**inputs)[0].tolist()
    logits = whisper(inputs.input_features, decoder_input_ids=torch.tensor([[27, 29]])).logits[0, -1]
    logits[[3, 5, 26]] = -torch.inf
    assert ids[0] == logits.argmax()
    assert not {3, 5} & set(ids)
    assert processor.decode([27, 29, 7, 4, 11, 11, 14, 26], skip_special_tokens=True) == "hello"
    assert processor.tokenizer("hello").input_ids == [27, 29, 7, 4, 11, 11, 14, 26]
    assert converted.generation_config.alignment_heads == [[0, 1]]
