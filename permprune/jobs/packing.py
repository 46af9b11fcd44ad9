"""`pack` and `unpack`: checkpoints with zeros to packed ones, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from permprune.commands import ANSWER, PROBE, answered
from permprune.errors import PermpruneError
from permprune.footprint import weight_bytes
from permprune.inference.pack import pack
from permprune.inference.quantizer import unpack_layers
from permprune.model_io import RECORD, load, read_record, write_weights
from permprune.processors import read_processor
from permprune.system.files import atomic_folder, require_absent, require_space, require_writable, write_json

PACKED = "packed"
"""The key of a record under which a packed folder keeps what `unpack_folder` needs."""


def pack_folder(folder: Path, out: Path, dtype: str = "bf16", block: int = 64) -> dict[str, Any]:
    """Write the pruned checkpoint in `folder` with packed weights to `out`, which Transformers loads.

    `dtype` and `block` are as those of `inference.pack.pack`. What the folder's gathers reorder is reordered by the
    packed layers themselves. Returns "bytes" of all weights before and after ("dense", "packed"), the same of the
    pruned "layers", the layers left "dense", and the largest "difference" of the outputs on the folder's probe, beside
    the "largest" output. Raises `PermpruneError`.
    """
    require_absent(out)
    require_writable(out)
    record = read_record(folder)
    if PACKED in record:
        raise PermpruneError(f"{folder} is packed already: unpack it first, or pack the folder that it was made from")
    model, processor, probe = load(folder), read_processor(folder), load_file(folder / PROBE)
    require_space(out, weight_bytes(model))
    patterns = {row["name"]: row["pattern"] for row in record["layers"]}
    orders = {name: torch.tensor(gather["order"]) for gather in record["gathers"] for name in gather["inputs"]}
    before = _sizes(model, set(patterns))
    dense = pack(model, patterns, dtype, block, orders)
    after = _sizes(model, set(patterns))
    kept = {"gathers": record["gathers"], "dtype": dtype, "block": block}
    with atomic_folder(out) as written:
        write_weights(model, processor, False, written)
        write_json(written / RECORD, {**record, "gathers": [], PACKED: kept})
        said = answered(load(written), probe)
        save_file(said, written / PROBE)
    return {
        "bytes": {"dense": before[0], "packed": after[0]},
        "layers": {"dense": before[1], "packed": after[1]},
        "dense": dense,
        "difference": float((said[ANSWER] - probe[ANSWER]).abs().max()),
        "largest": float(probe[ANSWER].abs().max()),
    }


def unpack_folder(folder: Path, out: Path) -> None:
    """Write the packed checkpoint in `folder` as an ordinary pruned one, zeros and gathers included, to `out`.

    Raises `PermpruneError`.
    """
    require_absent(out)
    require_writable(out)
    record = read_record(folder)
    kept = record.pop(PACKED, None)
    if kept is None:
        raise PermpruneError(f"{folder} is not packed: give a folder that permprune pack wrote")
    model, processor, probe = load(folder), read_processor(folder), load_file(folder / PROBE)
    unpack_layers(model, model.dtype, natural=False)
    model.hf_quantizer.remove_quantization_config(model)  # type: ignore[operator,union-attr]
    for module in model.modules():
        module._buffers.pop("channel_order", None)
    require_space(out, weight_bytes(model))
    with atomic_folder(out) as written:
        write_weights(model, processor, bool(kept["gathers"]), written)
        write_json(written / RECORD, {**record, "gathers": kept["gathers"]})
        save_file(answered(load(written), probe), written / PROBE)


def _sizes(model: PreTrainedModel, names: set[str]) -> tuple[int, int]:
    """Bytes of all tensors of a model, tied ones once, and of those of some layers."""
    every: dict[int, Tensor] = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    layers = [model.get_submodule(name) for name in names]
    own = [tensor for layer in layers for tensor in layer.state_dict().values()]
    return sum(tensor.nbytes for tensor in every.values()), sum(tensor.nbytes for tensor in own)
