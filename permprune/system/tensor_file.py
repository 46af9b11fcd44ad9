"""Files of safetensors that are written and read one tensor at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from permprune.system.shelf import Computed

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in the header of a safetensors file."""


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    described: Mapping[str, Tensor] | None = None,
) -> None:
    """Write tensors of any device to a safetensors file, and hold one of them at a time.

    They are read from the mapping twice, unless tensors of the same shapes and types are given as `described`.
    """
    described = tensors if described is None else described
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    sizes, end = {name: described[name].dtype.itemsize for name in described}, 0
    names = sorted(sizes, key=lambda name: -sizes[name])  # so that all are aligned
    for name in names:
        tensor = described[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        del tensor
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def read_tensors(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, each read when it is accessed, and the metadata.

    Raises `SafetensorError` for a damaged file.
    """
    with safe_open(path, "pt") as file:
        names, metadata = list(file.keys()), file.metadata() or {}

    def read(name: str) -> Tensor:
        with safe_open(path, "pt") as opened:  # what was read of it is freed with the tensor
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    return Computed(names, read), metadata
