"""Means of keys that move with the position, as rotary position embeddings turn them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor, nn

BLOCK = 128
"""Number of tokens whose scores with a mean are computed at a time."""


@dataclass(frozen=True, eq=False)
class Moving:
    """The mean of each channel of the keys of a layer at position t: `mean` cos(`frequency` t) + `side` sin(same).

    All three are fp32 (heads, width). A frequency of 0 is a mean that does not move. Before rotary embeddings (RoPE, Su
    et al. 2021, arXiv 2104.09864) keys may have large biases, which it turns: no mean after it removes those.
    """

    mean: Tensor
    side: Tensor
    frequency: Tensor

    def at(self, positions: Tensor) -> Tensor:
        """Return the mean at some positions, (batch, tokens): fp32 (batch, heads, tokens, width)."""
        angle = positions[:, None, :, None].float() * self.frequency[:, None]
        return self.mean[:, None] * angle.cos() + self.side[:, None] * angle.sin()

    def scores(self, query: Tensor, first: Tensor, count: int) -> Tensor:
        """Return the products of queries and the mean at `count` positions from `first` on.

        `query` is (batch, heads, rows, width) and `first` int64 (batch,). Returns fp32 (batch, heads, rows, count). The
        queries are turned to the start of each block of positions, so that all blocks share a small table.
        """
        frequencies, members, table = self._table
        query = query.float()
        even, odd = ((query * part[:, None]) @ members for part in (self.mean, self.side))
        starts = first[:, None] + torch.arange(0, count, BLOCK, device=query.device)
        angle = starts[..., None].double() * frequencies
        cos, sin = (t.float()[:, None, None] for t in (angle.cos(), angle.sin()))
        even, odd = even[..., None, :], odd[..., None, :]
        turned = torch.cat((even * cos + odd * sin, odd * cos - even * sin), -1)
        return (turned @ table).flatten(-2)[..., :count]

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor, Tensor]:
        """The frequencies, fp64 (number,), which channels have each, fp32 (heads, width, number), and the cosines and
        sines of the first positions, fp32 (2 number, BLOCK)."""
        frequencies = self.frequency.unique()
        members = (self.frequency[..., None] == frequencies).float()
        angle = frequencies[:, None].double() * torch.arange(BLOCK, device=frequencies.device)
        return frequencies.double(), members, torch.cat((angle.cos(), angle.sin())).float()

    def changed(self, change: Callable[[Tensor], Tensor]) -> Moving:
        """Return means with other tensors, such as those of some heads, or on another device."""
        return Moving(*(change(getattr(self, field.name)) for field in fields(self)))

    def where(self, chosen: Tensor, other: Moving) -> Moving:
        """Return these means for the chosen heads, bool (heads,), and other ones elsewhere."""
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return Moving(*(torch.where(chosen[:, None], one, two) for one, two in pairs))


@dataclass(frozen=True, eq=False)
class Rotary:
    """How a model may turn its keys: channel c by `frequency[c]`, fp32 (width,), for each position, together with
    channel `partner[c]`, int64 (width,), whose part has the sign `sign[c]`, fp32 (width,)."""

    frequency: Tensor
    partner: Tensor
    sign: Tensor

    def mean_of(self, keys: Tensor, positions: Tensor) -> Moving:
        """Return the mean of keys, fp32 (heads, tokens, width), before they are turned; positions are (tokens,)."""
        angle = positions[:, None].float() * self.frequency
        mean = (keys * angle.cos() - keys[..., self.partner] * self.sign * angle.sin()).mean(1)
        return Moving(mean, mean[:, self.partner] * self.sign, self.frequency.expand_as(mean).contiguous())


def still_mean(keys: Tensor) -> Moving:
    """Return the mean of keys, fp32 (heads, tokens, width), that does not move."""
    mean = keys.mean(1)
    return Moving(mean, torch.zeros_like(mean), torch.zeros_like(mean))


def rotaries_of(model: nn.Module, width: int) -> list[Rotary]:
    """Return how a model may turn keys of `width` channels: by each of its inverse frequencies, in halves or in pairs.

    Nothing depends on whether it does: what is taken from a key is added to its scores. So it is enough to try.
    """
    rotaries: list[Rotary] = []
    for name, buffer in model.named_buffers():
        if not name.endswith("inv_freq") or buffer.dim() != 1 or buffer.is_meta or 2 * len(buffer) > width:
            continue
        half, frequencies = len(buffer), buffer.detach().float().cpu()
        if any(torch.equal(frequencies.repeat(2), other.frequency[: 2 * half]) for other in rotaries):
            continue
        rest, places = torch.arange(2 * half, width), torch.arange(2 * half)
        for frequency, partner, first in (
            (frequencies.repeat(2), places.roll(half), places < half),
            (frequencies.repeat_interleave(2), places ^ 1, places % 2 == 0),
        ):
            sign = torch.where(first, -1.0, 1.0)
            zeros = torch.zeros(len(rest))
            rotaries.append(Rotary(torch.cat((frequency, zeros)), torch.cat((partner, rest)), torch.cat((sign, zeros))))
    return rotaries
