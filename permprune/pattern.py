"""The N:M pattern: which weights of a row survive, given a score for each."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Num, UInt8
from torch import Tensor

from permprune.errors import PermpruneError

WIDEST = 16
"""The largest M of the patterns that are looked for in weights."""

COUNTED = 8
"""Members of a group up to which counting who comes before whom is faster than sorting."""


@dataclass(frozen=True)
class Pattern:
    """Keep `n` of every `m` consecutive weights of a row (of the input dimension).

    Raises `PermpruneError` unless 1 <= n < m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise PermpruneError(f'pattern "{self}" keeps no or all weights: give N:M with 1 <= N < M, as "2:4"')

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Read "N:M". Raises `PermpruneError` for anything else."""
        if isinstance(text, Pattern):
            return text
        match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", text)
        if not match:
            raise PermpruneError(f'"{text}" is no N:M pattern: give two whole numbers, as "2:4"')
        return cls(int(match[1]), int(match[2]))

    @property
    def density(self) -> float:
        """Share of weights kept."""
        return self.n / self.m

    def divides(self, width: int) -> bool:
        return width % self.m == 0

    def require_divisible(self, width: int, name: str) -> None:
        """Raise `PermpruneError` when rows of `width` weights do not split into groups of m."""
        if not self.divides(width):
            raise PermpruneError(
                f"{name} has rows of {width} weights, which {self.m} does not divide: "
                f"choose a pattern whose M divides {width}, or leave that layer out"
            )

    def mask(self, score: Num[Tensor, "*rows width"]) -> Bool[Tensor, "*rows width"]:
        """Keep the n largest scores of every m consecutive ones.

        `score` is (..., width) with m dividing width; returns a bool tensor of the same shape. Ties are broken
        by position, the earlier weight first, so that the same scores give the same mask on every device.
        Raises `PermpruneError` when m does not divide the width or a score is NaN.
        """
        self.require_divisible(score.shape[-1], "a score matrix")
        if torch.isnan(score).any():
            raise PermpruneError("a score is NaN: check the weights and the calibration data for NaN or overflow")
        return self.mask_groups(score.unflatten(-1, (-1, self.m)), -1).flatten(-2)

    def mask_in_order(
        self, score: Num[Tensor, "rows width"], order: Int[Tensor, " width"]
    ) -> Bool[Tensor, "rows width"]:
        """The mask that is left when the columns stand in `order`, int64 (width,), put back: `score` is (rows, width).

        Returns bool (rows, width) in the order of `score`. Raises `PermpruneError` as `mask` does.
        """
        found = torch.empty_like(score, dtype=torch.bool)
        found[:, order] = self.mask(score[:, order])
        return found

    def mask_groups(self, score: Num[Tensor, "*shape"], dim: int) -> Bool[Tensor, "*shape"]:
        """The same as `mask`, unchecked, for scores whose dimension `dim` runs over the m members of each group."""
        return ranks(score, dim) < self.n

    def holds(self, weight: Num[Tensor, "*rows width"]) -> bool:
        """Whether every group of m consecutive weights of (..., width) has at most n non-zeros."""
        self.require_divisible(weight.shape[-1], "a weight matrix")
        return bool((weight.unflatten(-1, (-1, self.m)).ne(0).sum(-1) <= self.n).all())


def tightest(weight: Num[Tensor, "*rows width"]) -> Pattern | None:
    """The pattern, of all with M up to `WIDEST`, that leaves the fewest weights and that (..., width) holds.

    Of several that leave equally many it is the one with the smallest M; None where none holds, or all weights are 0.
    """
    width, held = weight.shape[-1], []
    for m in range(2, WIDEST + 1):
        if width % m == 0 and weight.numel():
            n = int(weight.unflatten(-1, (-1, m)).ne(0).sum(-1).max())
            held += [Pattern(n, m)] if 0 < n < m else []
    return min(held, key=lambda pattern: (pattern.density, pattern.m), default=None)


def ranks(score: Num[Tensor, "*shape"], dim: int) -> Int[Tensor, "*shape"] | UInt8[Tensor, "*shape"]:
    """How many scores along `dim` come before each: those larger, and the equal ones at earlier places.

    Returns integers of the shape of `score`, of a type that may be as small as uint8.
    """
    members = score.unbind(dim)
    if len(members) > COUNTED:
        order = score.sort(dim=dim, descending=True, stable=True).indices
        shape = [-1 if place == dim % score.dim() else 1 for place in range(score.dim())]
        count = torch.arange(len(members), device=score.device).view(shape).expand_as(order)
        return torch.empty_like(order).scatter_(dim, order, count)
    found = []
    for i, own in enumerate(members):
        before = torch.zeros_like(own, dtype=torch.uint8)
        for j, other in enumerate(members):
            if j != i:
                before += other >= own if j < i else other > own
        found.append(before)
    return torch.stack(found, dim)


MIXED = "mixed"
"""What stands for a pattern where each layer gets one of `CHOICES`."""


TOTAL = Pattern(2, 4)
"""The pattern whose number of weights a mix keeps."""


def parse_pattern(text: str) -> Pattern:
    """The pattern that "N:M" names, of "mixed" the one that keeps as many weights.

    Raises `PermpruneError` for anything else.
    """
    return TOTAL if text == MIXED else Pattern.parse(text)
