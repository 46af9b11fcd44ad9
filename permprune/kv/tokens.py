"""Packed states of tokens that grow at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from permprune.kernels import library
from permprune.kernels.attention.states import NUMBERS, WIDEST, PackedStates
from permprune.kernels.product.layout import FLOATS
from permprune.kv.packing import Channels, Parts, StatesLayout, decode, encode

BLOCK = 512
"""Number of tokens that are packed at a time, which bounds the memory for intermediate results."""

GROWTH = 64
"""Number of tokens for which memory is allocated when a few tokens are added and there is none left."""


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """A context in which new tensors can be written to later, in inference mode or not."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class PackedTokens:
    """Packed states of the tokens of a layer, keys or values, in the stored order of their channels.

    `parts` are those of `permprune.kv.packing`, with memory for more than the `length` tokens that are used.
    """

    def __init__(self, channels: Channels, layout: StatesLayout) -> None:
        self.channels, self.layout = channels, layout
        self.parts: Parts = {}
        self.length = 0
        self._states: PackedStates | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_states": None}  # pointers are not copied

    def append(self, states: Tensor) -> None:
        """Pack states, (batch, heads, tokens, width), and add them at the end."""
        left = states.shape[2]
        for block in states.detach().split(BLOCK, 2):
            self._write(encode(block, self.channels, self.layout), left)
            left -= block.shape[2]

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Unpack tokens `start` to `stop`: (batch, heads, stop - start, width), in the stored order."""
        states = self.native_states() if dtype in FLOATS else None
        if states is not None:
            return states.unpack(start, stop - start, dtype)
        parts = {name: part[:, :, start:stop] for name, part in self.parts.items()}
        return decode(parts, self.channels, self.layout, dtype)

    def native_states(self) -> PackedStates | None:
        """Return the parts as native kernels read them; None if there are no parts, or no kernels for them."""
        if self._states is None and self.parts:
            values, width = self.parts["values"], self.channels.shape[1]
            runs = values.device.type == "cpu" and self.layout.dtype in NUMBERS and width <= WIDEST
            if runs and library.available():
                self._states = PackedStates(self.parts, self.channels.level, self.layout.pattern, self.layout.dtype)
        return self._states

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self.length = min(self.length, length)

    def change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every part by `change(part)`, which selects or repeats rows of the batch."""
        self._states = None
        with _ordinary_tensors():
            self.parts = {name: change(part).contiguous() for name, part in self.parts.items()}

    def _write(self, parts: Parts, coming: int) -> None:
        """Write parts behind the used tokens, with memory for all `coming` tokens; no more than that for the first."""
        count = parts["values"].shape[2]
        if not self.parts or self.length + count > self.parts["values"].shape[2]:
            self._grow(parts, self.length + max(coming, GROWTH if self.length else 0))
        for name, part in parts.items():
            self.parts[name][:, :, self.length : self.length + count] = part
        self.length += count

    def _grow(self, like: Parts, capacity: int) -> None:
        """Allocate memory for `capacity` tokens and move the used ones there, one part after the other."""
        self._states = None
        for name, part in like.items():
            with _ordinary_tensors():
                grown = torch.empty(*part.shape[:2], capacity, *part.shape[3:], dtype=part.dtype, device=part.device)
            if self.length:
                grown[:, :, : self.length] = self.parts[name][:, :, : self.length]
            self.parts[name] = grown
