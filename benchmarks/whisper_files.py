"""Convert Whisper (Radford et al. 2023) from CTranslate2's file format."""

from __future__ import annotations

import json
import re
import shutil
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
"""dtypes of variables; the index is the number of the dtype in the file."""

MODULES: dict[str, tuple[str, ...]] = {
    "conv1": ("conv1",),
    "conv2": ("conv2",),
    "embeddings": ("embed_tokens",),
    "position_encodings": ("embed_positions",),
    "layer_norm": ("layer_norm",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
"""CTranslate2's name of a module, and the Transformers modules whose outputs it concatenates, in this order."""

PARAMETERS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}


def convert_whisper(files: Sequence[Path], folder: Path) -> None:
    """Write an English-only Whisper model to `folder` in fp32, with its processor and generation config.

    `files` are the paths of model.bin, config.json and tokenizer.json, in this order.
    """
    binary, settings, vocabulary = files
    variables = read_variables(binary)
    tokenizer = _tokenizer(vocabulary)
    weights = _weights(variables)
    embedding = weights["model.decoder.embed_tokens.weight"]
    config = WhisperConfig(
        vocab_size=len(embedding),
        d_model=embedding.shape[1],
        encoder_layers=_layers(variables, "encoder"),
        decoder_layers=_layers(variables, "decoder"),
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=len(weights["model.encoder.layers.0.fc1.bias"]),
        decoder_ffn_dim=len(weights["model.decoder.layers.0.fc1.bias"]),
        num_mel_bins=weights["model.encoder.conv1.weight"].shape[1],
        max_source_positions=len(weights["model.encoder.embed_positions.weight"]),
        max_target_positions=len(weights["model.decoder.embed_positions.weight"]),
        **_special_tokens(tokenizer.get_vocab()),
    )
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(weights)
    model.generation_config = _generation(
        json.loads(settings.read_text(encoding="utf-8")), tokenizer.get_vocab(), config.max_target_positions
    )
    model.save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)


def read_variables(file: Path) -> dict[str, NDArray[Any]]:
    """Read the variables of a model.bin file by name.

    All numbers in the file are little-endian. The header is the format version (uint32), the model type (string), the
    model revision (uint32) and the number of variables (uint32). For each variable follow its name (string), the number
    of dimensions (uint8), the size of each dimension (uint32), the number of its dtype (uint8), its length in bytes
    (uint32) and its values. A string is its length including the terminating zero (uint16), then its bytes. The aliases
    at the end of the file are ignored.
    """
    with file.open("rb") as stream:
        _read(stream, "I")
        _string(stream)
        _, count = _read(stream, "II")
        variables = {}
        for _ in range(count):
            name = _string(stream)
            (rank,) = _read(stream, "B")
            shape = _read(stream, "I" * rank)
            number, length = _read(stream, "BI")
            variables[name] = np.frombuffer(stream.read(length), TYPES[number]).reshape(shape)
    return variables


def _read(stream: IO[bytes], form: str) -> tuple[int, ...]:
    return struct.unpack(f"<{form}", stream.read(struct.calcsize(f"<{form}")))


def _string(stream: IO[bytes]) -> str:
    (length,) = _read(stream, "H")
    return stream.read(length).rstrip(b"\0").decode()


def _layers(variables: dict[str, NDArray[Any]], stack: str) -> int:
    return len({match[0] for name in variables if (match := re.match(rf"{stack}/layer_\d+", name))})


def _weights(variables: dict[str, NDArray[Any]]) -> dict[str, Tensor]:
    """The parameters in fp32 under their names in Transformers; variables that hold settings are left out."""
    weights = {}
    for name, array in variables.items():
        match = re.fullmatch(r"(encoder|decoder)/(?:layer_(\d+)/)?(.+)/(\w+)", name)
        if not match:
            continue
        stack, layer, module, parameter = match.groups()
        parent = f"model.{stack}." + (f"layers.{layer}." if layer else "")
        targets = MODULES[module]
        for target, piece in zip(targets, np.split(array, len(targets)), strict=True):
            weights[f"{parent}{target}.{PARAMETERS[parameter]}"] = torch.from_numpy(piece.astype(np.float32))
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    return {name: weight for name, weight in weights.items() if not name.endswith("k_proj.bias")}  # it is zero


def _tokenizer(vocabulary: Path) -> WhisperTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(vocabulary, Path(folder, "tokenizer.json"))
        tokenizer: WhisperTokenizer = WhisperTokenizer.from_pretrained(folder)
    return tokenizer


def _generation(settings: dict[str, Any], tokens: dict[str, int], length: int) -> GenerationConfig:
    """The generation config: no time stamps, and the tokens that the package's settings suppress are suppressed."""
    return GenerationConfig(
        **_special_tokens(tokens),
        max_length=length,
        is_multilingual=False,
        return_timestamps=False,
        no_timestamps_token_id=tokens["<|notimestamps|>"],
        prev_sot_token_id=tokens["<|startofprev|>"],
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
    )


def _special_tokens(tokens: dict[str, int]) -> dict[str, Any]:
    end = tokens["<|endoftext|>"]
    start = tokens["<|startoftranscript|>"]
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
