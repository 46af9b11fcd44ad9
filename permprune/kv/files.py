"""The folder that `permprune kv` writes: the channels of a pruned cache, and a record of how they were found."""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from permprune.checkpoints.gathers import gather_buffers
from permprune.checkpoints.schema import Malformed, decode, dotted, encode
from permprune.errors import PermpruneError
from permprune.kv.config import KVConfig, bits_of
from permprune.kv.moving import Moving
from permprune.kv.packing import Channels
from permprune.options import Range
from permprune.pattern import MIXED
from permprune.system.digests import digest_of, rounded_digests
from permprune.system.files import write_json, write_whole
from permprune.system.progress import log

RECORD, TENSORS = "kv.json", "kv.safetensors"
"""Names of the files: the record, and the tensors, "layers.{number}.{keys or values}." and a name of `DTYPES`."""

FORMAT = 1
"""The version of the format that is written, and the newest that can be read."""

AGAIN = "make the cache again with permprune kv"

FOR_IT = "make a cache for it with permprune kv"

SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim")
"""Entries of a model's config that tell whether a cache is for that model."""

NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.(keys|values)\.(order|weight|level|bits|mean|side|frequency)")
"""The names of tensors."""

MOVING = tuple(field.name for field in dataclasses.fields(Moving))
"""The last parts of names of the tensors of `Moving`."""

DTYPES = {
    "order": torch.int32,
    "weight": torch.float32,
    "level": torch.float32,
    "bits": torch.int32,
    **dict.fromkeys(MOVING, torch.float32),
}
"""The types of tensors, by the last part of their names."""

LayerChannels = dict[int, tuple[Channels, Channels]]
"""The channels of keys and values, by the number of the layer."""


class OtherModelError(PermpruneError):
    """The cache was made for another model."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """The share of the calibration's score that is kept, in the model's order of channels and in the one found."""

    natural: float
    found: float


@dataclasses.dataclass(frozen=True)
class CacheMeasurement:
    """Perplexity with the dense and with the pruned cache, over `count` tokens, and the bytes of both caches.

    Older tokens were packed in every call (`PrunedCache.exact_window`). The bytes are those of one window. `error` is
    the standard error of `lost`, on pairs of the same windows; None for one window, and in records of older releases.
    """

    data: str
    length: int
    count: int
    dense: float
    pruned: float
    dense_bytes: int
    pruned_bytes: int
    error: float | None = None

    @property
    def lost(self) -> float:
        """The share by which perplexity grows."""
        return self.pruned / self.dense - 1


@dataclasses.dataclass(frozen=True)
class KVRecord:
    """The record of a pruned cache.

    `shape` has entries of the model's config (`SHAPE`). `calibration` describes the data and `kept` the share of the
    score that keys and values keep. `weights` are the digests of the model's weights (`weights_of`), and `contents` is
    that of the settings and the channels; empty in folders of older releases. `budget` is the share of the bytes of a
    16-bit cache by which the bits of each head were chosen, and `chosen` the loss with it on text that was held out.
    """

    format: Annotated[int, Range(FORMAT, FORMAT)]
    permprune: str
    model: str
    shape: dict[str, int | None]
    config: KVConfig
    order: str
    calibration: dict[str, str | int | None]
    kept: dict[str, Kept]
    seconds: float
    measured: CacheMeasurement | None = None
    weights: dict[str, str] = dataclasses.field(default_factory=dict)
    contents: str = ""
    budget: float | None = None
    chosen: CacheMeasurement | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def shape_of(model: PreTrainedModel) -> dict[str, int | None]:
    """Return the entries of a model's config that a cache depends on; None for those that it lacks."""
    config = model.config.get_text_config(decoder=True)
    values = {name: getattr(config, name, None) for name in SHAPE}
    return {name: value if isinstance(value, int) else None for name, value in values.items()}


def weights_of(model: PreTrainedModel) -> dict[str, str]:
    """Return digests of a model's weights and gathers, by the type that they are rounded to (`rounded_digests`).

    Copies of the model in other floating-point types have one of them in common. Empty if weights are offloaded.
    """
    tensors = {**model.state_dict(), **gather_buffers(model)}
    return {} if any(t.is_meta for t in tensors.values()) else rounded_digests(sorted(tensors.items()))


def write_cache(folder: Path, channels: LayerChannels, record: KVRecord) -> None:
    """Write the files into an existing folder. Raises `PermpruneError` if they cannot be written."""
    tensors = {
        f"layers.{number}.{side}.{name}": tensor.to(dtype).contiguous()
        for number, pair in channels.items()
        for side, channels_of_side in zip(("keys", "values"), pair, strict=True)
        for name, dtype in DTYPES.items()
        if (tensor := getattr(channels_of_side.moving if name in MOVING else channels_of_side, name, None)) is not None
    }
    write_whole(folder / TENSORS, lambda path: save_file(tensors, path))
    write_json(folder / RECORD, encode(dataclasses.replace(record, contents=_contents(record.config, tensors))))


def read_record(folder: Path) -> KVRecord:
    """Read the record. Raises `PermpruneError` if there is none or it is damaged."""
    path = folder / RECORD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and "permute" in values:  # the name in earlier versions
            values["order"] = values.pop("permute")
        record: KVRecord = decode(KVRecord, values)
    except OSError:
        raise PermpruneError(f"{folder} holds no {RECORD}: give a folder that permprune kv wrote") from None
    except (Malformed, PermpruneError, RecursionError, ValueError) as error:
        raise PermpruneError(f"{path} is damaged ({error}): {AGAIN}") from error
    return record


def read_channels(folder: Path, record: KVRecord) -> LayerChannels:
    """Read the channels.

    Raises `PermpruneError` unless they are all that the record's settings need and nothing else, in the right types,
    shapes and ranges, and were written together with these settings.
    """
    path = folder / TENSORS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise PermpruneError(f"{path} does not load: {AGAIN}") from error
    numbers: set[int] = set()
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None or not _needs(record.config, match[2], match[3]):
            raise PermpruneError(f"{path} holds {reprlib.repr(name)}, which its settings do not need: {AGAIN}")
        if tensor.dtype != DTYPES[match[3]]:
            raise PermpruneError(f"{path} holds {name} of type {tensor.dtype}, not {DTYPES[match[3]]}: {AGAIN}")
        numbers.add(int(match[1]))
    channels = {
        i: (_side(path, tensors, f"layers.{i}.keys"), _side(path, tensors, f"layers.{i}.values"))
        for i in sorted(numbers)
    }
    if record.contents and record.contents != _contents(record.config, tensors):
        raise PermpruneError(f"{path} does not belong to the settings in {RECORD}, or one was changed: {AGAIN}")
    return channels


def require_model(folder: Path, record: KVRecord, model: PreTrainedModel) -> None:
    """Raise `OtherModelError` if the cache was made for another model.

    Warns if that cannot be known, because the folder is of an older release or weights of the model are offloaded.
    """
    for name, value in shape_of(model).items():
        if record.shape.get(name) != value:
            raise OtherModelError(
                f"{folder} is for a model with {name} {record.shape.get(name)}, and this one has {value}: {FOR_IT}"
            )
    weights = weights_of(model) if record.weights else {}
    if not weights:
        lacking = "its model's weights are offloaded" if record.weights else f"its {RECORD} has no digest of the model"
        log.warning("%s may be for another model of the same shape: %s", folder, lacking)
    elif not record.weights.items() & weights.items():
        made_for = dotted("", record.model)
        raise OtherModelError(f"{folder} is for {made_for}, and this model has other weights: {FOR_IT}")


def _needs(config: KVConfig, side: str, part: str) -> bool:
    """Return whether a cache with these settings may have a part of its keys or values."""
    text = getattr(config, side)
    coded = text == MIXED or bits_of(text) is not None
    return coded and (side == "keys" or part == "bits") if part in ("bits", *MOVING) else True


def _side(path: Path, tensors: dict[str, Tensor], name: str) -> Channels:
    order, weight, level = (tensors.get(f"{name}.{part}") for part in ("order", "weight", "level"))
    if order is None or weight is None or level is None or order.dim() != 2:
        raise PermpruneError(f"{path} lacks tensors of {reprlib.repr(name)}: {AGAIN}")
    bits, means = tensors.get(f"{name}.bits"), [tensors[key] for part in MOVING if (key := f"{name}.{part}") in tensors]
    if means and len(means) < len(MOVING):
        raise PermpruneError(f"{path} lacks tensors of the mean of {reprlib.repr(name)}: {AGAIN}")
    moving = Moving(*means) if means else None
    channels = Channels(order.long(), weight, level, None if bits is None else bits.long(), moving)
    channels.check(f"{path}: {name}")
    return channels


def _contents(config: KVConfig, tensors: dict[str, Tensor]) -> str:
    """Return the digest of the settings and the tensors of a cache."""
    return digest_of([(json.dumps(encode(config), sort_keys=True), torch.empty(0)), *sorted(tensors.items())])
