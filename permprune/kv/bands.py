"""The layer of a pruned cache whose heads have different numbers of bits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.kv.attention import Call, States, StatesLayer
from permprune.kv.config import KVConfig
from permprune.kv.layer import PackedCacheLayer, require_shape
from permprune.kv.packing import Channels
from permprune.pattern import MIXED


class MixedLayer(StatesLayer):
    """Keys and values of one attention layer, of which each head has bits of its own.

    Heads with the same bits of keys and of values are a band, which is a `PackedCacheLayer`; `heads` are those of each
    band, int64. Raises `PermpruneError` if the channels do not say how many there are (`Channels.bits`).
    """

    def __init__(
        self, config: KVConfig, keys: Channels | None, values: Channels | None, exact_window: bool = False
    ) -> None:
        super().__init__()
        if keys is None or values is None:
            raise PermpruneError(
                "heads with bits of their own need the channels of a folder that permprune kv --bytes wrote"
            )
        self.channels = keys, values
        bands: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
        patterns = zip(_patterns(config.keys, keys), _patterns(config.values, values), strict=True)
        for head, pair in enumerate(patterns):
            bands[pair].append(head)
        self.heads = [torch.tensor(heads) for heads in bands.values()]
        self.layers = [
            PackedCacheLayer(config.replace(keys=pair[0], values=pair[1]), keys.of(own), values.of(own), exact_window)
            for pair, own in zip(bands, self.heads, strict=True)
        ]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raise `PermpruneError` if the channels have another shape than the states."""
        require_shape(self.channels, key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.heads = [heads.to(self.device) for heads in self.heads]
        self.is_initialized = True

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[States, States]:
        """Add the states of new tokens, (batch, heads, tokens, width); returns what their queries attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        views = [
            layer.update(key_states[:, heads], value_states[:, heads])[0]
            for heads, layer in zip(self.heads, self.layers, strict=True)
        ]
        view = _Views(
            views, self.heads, torch.Size((*key_states.shape[:2], self.get_seq_length(), key_states.shape[3]))
        )
        return view, view

    def get_seq_length(self) -> int:
        """Return the number of tokens."""
        return self.layers[0].get_seq_length()

    def reset(self) -> None:
        """Remove all tokens."""
        for layer in self.layers:
            layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -`tokens_to_remove` tokens, as `PackedCacheLayer.crop`."""
        for layer in self.layers:
            layer.crop(tokens_to_remove)

    def change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            layer.change_batch(change)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same tokens as they come from the model."""
        return sum(layer.dense_nbytes for layer in self.layers)

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors that hold states of tokens, or their places."""
        for layer in self.layers:
            yield from layer.tensors()


class _Views(States):
    """What the queries of one `update` attend to: a view for each band of key/value heads."""

    def __init__(self, views: list[States], heads: list[Tensor], shape: torch.Size) -> None:
        self.views, self.heads, self.shape = views, heads, shape

    def attend(self, call: Call, module: nn.Module) -> Tensor:
        group, device = call.query.shape[1] // self.shape[1], call.query.device
        rows = [(heads[:, None] * group + torch.arange(group, device=device)).flatten() for heads in self.heads]
        outputs = [view.attend(call.of_heads(own), module) for view, own in zip(self.views, rows, strict=True)]
        return torch.cat(outputs, 2)[:, :, torch.cat(rows).argsort()]


def _patterns(text: str, channels: Channels) -> list[str]:
    """Return the pattern of each head, as `KVConfig` has it."""
    if text != MIXED:
        return [text] * len(channels.order)
    if channels.bits is None:
        raise PermpruneError("the channels have no bits for each head: make the cache again with permprune kv --bytes")
    return [f"{bits}bit" for bits in channels.bits.tolist()]
