"""N:M sparsity patterns: which weights of a row are kept, given a score for each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from permprune.errors import PermpruneError
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch
    from jaxtyping import Bool, Int, Num, UInt8
    from torch import Tensor

WIDEST = 16
"""The largest M of the patterns that `tightest` considers."""

PAIRED = "p"
"""What follows N:M in the name of a pattern of pairs."""

MIXED = "mixed"
"""The name, in place of N:M, with which each layer gets its own pattern."""

DENSE = "dense"
"""The name of the candidate of a mix that keeps all weights of a layer."""

COUNTED = 8
"""The largest M for which ranks are computed by pairwise comparison, which is then faster than sorting."""


@dataclass(frozen=True)
class Pattern:
    """The pattern that keeps `n` of every `m` consecutive weights along the input dimension.

    With a `unit` of 2, written 4:8p, it keeps or prunes two adjacent weights together: the pairs whose scores have the
    largest sums of squares. Raises `PermpruneError` unless 1 <= n < m, and the unit divides both.
    """

    n: int
    m: int
    unit: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise PermpruneError(f'pattern "{self}" keeps no or all weights: give N:M with 1 <= N < M, as "2:4"')
        if self.n % self.unit or self.m % self.unit:
            raise PermpruneError(f'pattern "{self}" splits a pair: give even numbers, as "4:8p"')

    def __str__(self) -> str:
        return f"{self.n}:{self.m}{PAIRED if self.unit == 2 else ''}"

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Parse "N:M" or "N:Mp"; a `Pattern` is returned unchanged. Raises `PermpruneError` for anything else."""
        if isinstance(text, Pattern):
            return text
        match = re.fullmatch(rf"\s*(\d{{1,9}})\s*:\s*(\d{{1,9}})({PAIRED}?)\s*", text)
        if not match:
            raise PermpruneError(f'"{text}" is not an N:M pattern: give two whole numbers, as "2:4"')
        return cls(int(match[1]), int(match[2]), 2 if match[3] else 1)

    @classmethod
    def containing(cls, patterns: Iterable[Pattern], density: float) -> Pattern:
        """Return the pattern whose groups contain those of all `patterns`, and that keeps about this share."""
        m = math.lcm(*(pattern.m for pattern in patterns))
        return cls(min(m - 1, max(1, round(density * m))), m)

    @property
    def density(self) -> float:
        """The share of the weights that is kept, N / M."""
        return self.n / self.m

    def divides(self, width: int) -> bool:
        """Return whether rows of `width` weights can be split into groups of m."""
        return width % self.m == 0

    def require_divisible(self, width: int, name: str) -> None:
        """Raise `PermpruneError` if m does not divide `width`; `name` is what has rows of `width` weights."""
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
        """Return the mask for columns that are grouped in the given order.

        `score` is (rows, width) and `order`, a permutation of the columns, int64 (width,). Returns a bool tensor (rows,
        width) with the columns in the original order of `score`. Raises `PermpruneError` as `mask` does.
        """
        mask = torch.empty_like(score, dtype=torch.bool)
        mask[:, order] = self.mask(score[:, order])
        return mask

    def mask_groups(self, score: Num[Tensor, "*shape"], dim: int) -> Bool[Tensor, "*shape"]:
        """Return the mask of scores that are already grouped: dimension `dim` has the m members of each group.

        Returns a bool tensor of the shape of `score`. Ties are broken as by `mask`; scores are not checked for NaN.
        """
        if self.unit == 1:
            return ranks(score, dim) < self.n
        dim %= score.dim()
        energy = score.square().unflatten(dim, (-1, self.unit)).sum(dim + 1)
        return (ranks(energy, dim) < self.n // self.unit).repeat_interleave(self.unit, dim)

    def holds(self, weight: Num[Tensor, "*rows width"]) -> bool:
        """Return whether every group of m consecutive weights of `weight`, (..., width), has at most n non-zeros.

        Those of pairs are in at most n / 2 of them.
        Raises `PermpruneError` if m does not divide the width.
        """
        self.require_divisible(weight.shape[-1], "a weight matrix")
        kept = weight.unflatten(-1, (-1, self.m // self.unit, self.unit)).ne(0).any(-1)
        return bool((kept.sum(-1) <= self.n // self.unit).all())


def tightest(weight: Num[Tensor, "*rows width"]) -> Pattern | None:
    """Return the pattern of the lowest density, with M up to `WIDEST`, that `weight`, (..., width), satisfies.

    Of several patterns with the same density, the one with the smallest M is returned. Returns None if the weight
    satisfies no pattern or is all zeros.
    """
    width, held = weight.shape[-1], []
    for m in range(2, WIDEST + 1):
        if width % m == 0 and weight.numel():
            n = int(weight.unflatten(-1, (-1, m)).ne(0).sum(-1).max())
            held += [Pattern(n, m)] if 0 < n < m else []
    return min(held, key=lambda pattern: (pattern.density, pattern.m), default=None)


def ranks(score: Num[Tensor, "*shape"], dim: int) -> Int[Tensor, "*shape"] | UInt8[Tensor, "*shape"]:
    """Return the rank of each score along `dim`: 0 for the largest; of equal scores the earlier one ranks first.

    Returns a tensor of the shape of `score`, of type uint8 if `dim` has at most `COUNTED` entries, else int64.
    """
    members = score.unbind(dim)
    if len(members) > COUNTED:
        order = score.sort(dim=dim, descending=True, stable=True).indices
        shape = [-1 if place == dim % score.dim() else 1 for place in range(score.dim())]
        count = torch.arange(len(members), device=score.device).view(shape).expand_as(order)
        return torch.empty_like(order).scatter_(dim, order, count)
    larger = [torch.zeros_like(score, dtype=torch.uint8) for score in members]
    for i, score in enumerate(members):
        for j, other in enumerate(members):
            if j != i:
                larger[i] += other >= score if j < i else other > score
    return torch.stack(larger, dim)
