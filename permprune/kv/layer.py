"""The layer of a pruned cache: packed past tokens, and whole ones at both ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kv.attention import States, StatesLayer
from permprune.kv.coding import TYPES
from permprune.kv.config import KVConfig, bits_of, pattern_of
from permprune.kv.packing import Channels, PackedTokens, StatesLayout
from permprune.kv.view import View
from permprune.system.device import dtype_named

STEP = 8
"""Number of tokens that are packed at a time when they leave the window."""


class PackedCacheLayer(StatesLayer):
    """Keys and values of one attention layer, of which all but the first and the newest tokens are packed.

    `keys` and `values`, (batch, heads, tokens, width) in the stored order of their channels, are the whole tokens: the
    first `sinks`, then those after the packed ones. A query that comes when there are `count` tokens reads
    `packed_count(count)` of them packed.

    With left padding, the whole first tokens of a row are the first ones that are read: padding is packed in their
    place. `places`, int64 (batch, tokens), are then the positions of the tokens as they stand here, sinks first. It is
    None if they stand in order. `padding`, int64 (batch,), is what is subtracted from them where means of keys move.

    By default, tokens that come in one call read each other whole. With `exact_window` a query reads the same tokens
    packed in whatever calls the tokens come, as if one by one.
    """

    keys: Tensor
    values: Tensor

    def __init__(
        self,
        config: KVConfig,
        key_channels: Channels | None = None,
        value_channels: Channels | None = None,
        exact_window: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.exact_window = config, exact_window
        self.channels = key_channels, value_channels
        self.packed: tuple[PackedTokens, PackedTokens] | None = None
        self.places: Tensor | None = None
        self.padding: Tensor | None = None

    def packed_count(self, count: int) -> int:
        """Return how many of `count` tokens are packed: in steps of 8, so that at least `window` are whole."""
        return max(0, count - self.config.sinks - self.config.window) // STEP * STEP

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for states of this type and shape. Raises `PermpruneError` if the channels have another shape."""
        require_shape(self.channels, key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        packed = []
        for name, states, channels in zip(("keys", "values"), (key_states, value_states), self.channels, strict=True):
            text = getattr(self.config, name)
            bits, pattern = bits_of(text), pattern_of(text, states.shape[3])
            channels = channels or Channels.natural(states.shape[1], states.shape[3], bits)
            if (bits is None) != (channels.bits is None):
                raise PermpruneError(f"the channels of the {name} were not found for {text}: make a cache for it")
            stored = dtype_named(self.config.dtype) or states.dtype
            layout = StatesLayout(pattern, stored if bits is None else TYPES[bits], self.config.recovery == "sign")
            packed.append(PackedTokens(channels.to(self.device), layout))
        self.packed = packed[0], packed[1]
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: object, **options: object
    ) -> tuple[States, States]:
        """Add the states of new tokens, (batch, heads, tokens, width); returns what their queries attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.packed is not None
        past, new = self.get_seq_length(), (key_states, value_states)
        channels = [packed.channels for packed in self.packed]
        arranged = [side.arrange(states) for side, states in zip(channels, new, strict=True)]
        whole = [torch.cat(pair, 2) for pair in zip((self.keys, self.values), arranged, strict=True)]
        count, before = past + key_states.shape[2], self.packed[0].length
        if self.places is not None:
            added = torch.arange(past, count, device=self.device).expand(len(key_states), -1)
            self.places = torch.cat((self.places, added), 1)
        view = View(self, whole, before, new if not past and not self.exact_window else None)
        view.leaving = max(0, self.packed_count(count) - before)
        self.store(view)
        return view, view

    def store(self, view: View) -> None:
        """Replace the tokens by those of a view, of which the leaving ones are packed."""
        assert self.packed is not None
        self.keys, self.values = view.whole
        if view.leaving:
            sinks, stop = self.config.sinks, self.config.sinks + view.leaving
            for packed, states in zip(self.packed, view.whole, strict=True):
                packed.truncate(view.before)
                leaving = states[:, :, sinks:stop]
                if packed.channels.moving is not None:
                    leaving = leaving.float() - self.means(packed, view.before, view.before + view.leaving)
                packed.append(leaving)
            self.keys, self.values = (torch.cat((s[:, :, :sinks], s[:, :, stop:]), 2) for s in view.whole)

    def positions(self, start: int, stop: int) -> Tensor:
        """Return the positions after left padding of packed tokens `start` to `stop`, int64 (batch or 1, tokens)."""
        sinks = self.config.sinks
        places = torch.arange(sinks + start, sinks + stop, device=self.device)[None]
        if self.places is not None:
            places = self.places[:, sinks + start : sinks + stop]
        return places if self.padding is None else places - self.padding[:, None]

    def means(self, packed: PackedTokens, start: int, stop: int) -> Tensor:
        """Return the moving means of packed tokens as they are stored, fp32 (batch or 1, heads, tokens, width)."""
        assert packed.channels.moving is not None
        return packed.channels.arrange(packed.channels.moving.at(self.positions(start, stop)))

    def get_seq_length(self) -> int:
        """Return the number of tokens."""
        return 0 if self.packed is None else int(self.keys.shape[2]) + self.packed[0].length

    def reset(self) -> None:
        """Remove all tokens."""
        self.keys = self.values = self.packed = self.places = self.padding = None  # type: ignore[assignment]
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -`tokens_to_remove` tokens.

        If fewer than `window` whole tokens remain, those before them stay packed. Raises `ValueError` for a positive
        number, as the layers of Transformers do, and `PermpruneError` if hardly more than left padding would remain.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, not {tokens_to_remove}")
        if tokens_to_remove == 0 or self.packed is None:
            return
        left = max(0, self.get_seq_length() + tokens_to_remove)
        sinks = min(left, self.config.sinks)
        packed = min(left - sinks, self.packed[0].length)
        if self.places is not None:
            places = self.places[:, :left]
            if (places >= left).any():
                raise PermpruneError("the cache is cropped into left padding: make a new one")
            self.places = places
        for tokens in self.packed:
            tokens.truncate(packed)
        self.keys, self.values = (states[:, :, : left - packed].clone() for states in (self.keys, self.values))

    def change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.packed is not None:
            self.keys, self.values = change(self.keys), change(self.values)
            self.places = None if self.places is None else change(self.places)
            self.padding = None if self.padding is None else change(self.padding)
            for packed in self.packed:
                packed.change_batch(change)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same tokens as they come from the model."""
        if self.packed is None:
            return 0
        whole = (self.keys, self.values)
        return self.get_seq_length() * sum(s.element_size() * s.shape[0] * s.shape[1] * s.shape[3] for s in whole)

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors that hold states of tokens, or their places."""
        if self.packed is not None:
            yield from (self.keys, self.values)
            yield from () if self.places is None else (self.places,)
            for packed in self.packed:
                yield from packed.parts.values()


def require_shape(channels: tuple[Channels | None, Channels | None], keys: Tensor, values: Tensor) -> None:
    """Raise `PermpruneError` if the channels of keys or values have another shape than these states."""
    for name, own, states in zip(("keys", "values"), channels, (keys, values), strict=True):
        heads, width = states.shape[1], states.shape[3]
        if own is not None and own.shape != (heads, width):
            raise PermpruneError(
                f"the cache is for {name} of {own.shape[0]} heads of {own.shape[1]} channels, and the model has "
                f"{heads} of {width}: make one for this model with permprune kv"
            )
