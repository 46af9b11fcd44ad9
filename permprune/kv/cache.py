"""The pruned cache of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from permprune.errors import PermpruneError
from permprune.kv.attention import use_attention
from permprune.kv.bands import MixedLayer
from permprune.kv.config import KVConfig
from permprune.kv.files import read_channels, read_record, require_model
from permprune.kv.layer import PackedCacheLayer
from permprune.kv.packing import Channels
from permprune.models.forward import is_causal_lm
from permprune.pattern import MIXED
from permprune.system.progress import log

PRUNED = (PackedCacheLayer, MixedLayer)


class PrunedCache(Cache):  # type: ignore[misc]
    """A key/value cache for Transformers that stores past tokens with N of every M channels of a head.

    The newest tokens and the first few stay whole (`KVConfig`). Give it to `model.generate` or to a forward pass as
    `past_key_values`; after `reset` it can be used again. The model is set to compute attention through
    `permprune.kv.attention`, which does not change what it computes with other caches.

    `channels` are those of the keys and of the values of each layer, by layer; without them the channels are in the
    model's order and all equally important, which loses more. With `exact_window` the tokens of a prompt read each
    other as they would one by one, the older ones packed; by default they read each other whole. Layers without full
    attention, such as those with a sliding window, keep the layers of Transformers and are named in a warning.

    Raises `PermpruneError` for a model that is no decoder-only language model, has no layer with full attention, or
    does not use Transformers' attention interface.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: KVConfig | None = None,
        channels: dict[int, tuple[Channels, Channels]] | None = None,
        *,
        exact_window: bool = False,
    ) -> None:
        self.config, self.channels = config or KVConfig(), channels
        layers, full = attention_layers(model)
        if channels is not None and channels.keys() != set(full):
            raise PermpruneError(
                f"the cache is for {len(channels)} layers with full attention, and the model has {len(full)}: "
                "make one for this model with permprune kv"
            )
        if others := {i: type(layer).__name__ for i, layer in enumerate(layers) if i not in full}:
            kinds = ", ".join(sorted(set(others.values())))
            numbers = ", ".join(map(str, others))
            log.warning("layers %s have no full attention: they keep their own cache (%s)", numbers, kinds)
        use_attention(model)
        for i in full:
            keys, values = (None, None) if channels is None else channels[i]
            kind = MixedLayer if MIXED in (self.config.keys, self.config.values) else PackedCacheLayer
            layers[i] = kind(self.config, keys, values, exact_window)
        super().__init__(layers=layers)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, model: PreTrainedModel, *, exact_window: bool = False, **changes: Any
    ) -> PrunedCache:
        """Return an empty cache with the channels and settings that `permprune kv` wrote to a folder.

        `changes` are settings of `KVConfig` in place of those of the folder: `dtype="int8"`, `window=64`. The channels
        were found for the folder's patterns. Raises `PermpruneError` if the folder is damaged or was made for another
        model than this one (in whatever type it is loaded).
        """
        folder = Path(folder)
        record = read_record(folder)
        require_model(folder, record, model)
        return cls(model, record.config.replace(**changes), read_channels(folder, record), exact_window=exact_window)

    @property
    def nbytes(self) -> int:
        """Bytes of all memory that holds states of tokens, each storage counted once.

        The orders and levels of channels, which do not grow with the tokens, are not counted.
        """
        return sum(map(_storage_bytes, self.layers))

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the same tokens take in Transformers' `DynamicCache`."""
        return sum(layer.dense_nbytes if isinstance(layer, PRUNED) else _storage_bytes(layer) for layer in self.layers)


def _storage_bytes(layer: Any) -> int:
    """Return the bytes of all memory that holds states of tokens in a layer of a cache."""
    held = layer.tensors() if isinstance(layer, PRUNED) else vars(layer).values()
    storages = [value.untyped_storage() for value in held if isinstance(value, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def attention_layers(model: PreTrainedModel) -> tuple[list[Any], list[int]]:
    """Return Transformers' cache layers for a model, and the numbers of those with full attention.

    Raises `PermpruneError` for a model that is no decoder-only language model, or has no such layer.
    """
    if not is_causal_lm(model):
        raise PermpruneError(f"{type(model).__name__} is no decoder-only language model: it has no cache to prune")
    layers = list(DynamicCache(config=model.config).layers)
    full = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
    if not full:
        raise PermpruneError(f"{type(model).__name__} has no layer with full attention: it has no cache to prune")
    return layers, full
