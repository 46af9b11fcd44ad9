"""Convert language models from GGUF files, one parameter at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

ARCHITECTURES = ("llama", "qwen2")
"""Architectures whose parameters `Weights` reads; others may be stored in ways that it does not know."""

SHARD = 10**9
"""Most bytes in one file of weights: while a file is written, its parameters are in memory."""

CHUNK = 2**24
"""Most weights that are dequantized at once: dequantization takes many times their size."""


def convert(files: Sequence[Path], folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the model in a GGUF file to `folder` in `dtype`, with its tokenizer.

    `files` are the consecutive parts of one GGUF file, one or several. They are joined in the folder of the first part,
    which must contain nothing else. Raises `ValueError` if the architecture is not one of `ARCHITECTURES`.
    """
    whole = _join(files)
    place: dict[str, Any] = {"gguf_file": whole.name, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(whole.parent, **place)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _write_weights(Weights(whole, config), model, folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(whole.parent, **place).save_pretrained(folder)


convert_bf16 = partial(convert, dtype=torch.bfloat16)


class Weights:
    """The parameters in a GGUF file, with the names and the values that Transformers gives them.

    The files are written by llama.cpp's converter, which reorders the rows of LLaMA's query and key projections. `read`
    restores their order.
    """

    def __init__(self, file: Path, config: PretrainedConfig) -> None:
        reader = GGUFReader(file)
        self._file = file
        self._stored = {tensor.name: tensor for tensor in reader.tensors}
        self._architecture: str = reader.fields["general.architecture"].contents()
        if self._architecture not in ARCHITECTURES:
            raise ValueError(f"no conversion of {self._architecture} from GGUF, only of {', '.join(ARCHITECTURES)}")
        numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
        self._names = get_tensor_name_map(numbers[self._architecture], config.num_hidden_layers)
        self._heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return the parameter `name`, dequantized and rounded to `dtype`. Raises `KeyError` if the file has none."""
        module, kind = name.rsplit(".", 1)
        stored = self._stored[f"{self._names[module]}.{kind}"]
        # Not stored.data, which maps the file: the pages that were read would stay in memory.
        data = np.fromfile(self._file, stored.data.dtype, stored.data.size, offset=stored.data_offset)
        data = data.reshape(stored.data.shape)
        shape = stored.shape[::-1].tolist()
        weight = torch.empty(shape, dtype=dtype)
        rows = max(1, CHUNK * shape[0] // weight.numel())
        for start in range(0, shape[0], rows):
            chunk = slice(start, start + rows)
            weight[chunk] = torch.from_numpy(dequantize(data[chunk], stored.tensor_type))
        heads = self._heads.get(stored.name.split(".")[-2]) if self._architecture == "llama" else None
        if heads:
            weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(shape)
        return weight


def _join(files: Sequence[Path]) -> Path:
    """Append the parts to the first one, and remove them to save space."""
    whole = files[0].rename(files[0].with_name("model.gguf"))
    with whole.open("ab") as sink:
        for part in files[1:]:
            with part.open("rb") as source:
                shutil.copyfileobj(source, sink, 1 << 20)
            part.unlink()
    return whole


def _write_weights(weights: Weights, model: PreTrainedModel, folder: Path) -> None:
    """Write the parameters of `model`, which is on the meta device, to one safetensors file or several and an index."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    split = split_torch_state_dict_into_shards(parameters, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        save_file(
            {name: weights.read(name, parameters[name].dtype) for name in names},
            folder / file,
            metadata={"format": "pt"},
        )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
