"""Symmetric matrices of which one triangle is stored, in fp32 or as correlations in fp16.

Processes that divide the rows of weights divide these matrices as well (`permprune.system.sharding`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from permprune.system import distributed, sharding
from permprune.system.shelf import Computed, Shelf

STRIP = 256
"""Number of rows that are stored, and multiplied, at a time."""


@dataclass(frozen=True)
class Symmetric:
    """A symmetric matrix of which the upper triangle is stored.

    `strips[i]` are the rows from `STRIP` * i on, as many as `STRIP`, and of them the columns from `STRIP` * i on. With
    `diagonal`, fp32 (size,), which is then exact, they are the correlations m_ij / sqrt(m_ii * m_jj) in fp16: their
    rounding error is at most 1 / 2048 of each element. If processes divide the matrix, strips of others have no rows.
    """

    strips: tuple[Tensor, ...]
    diagonal: Tensor | None = None

    @classmethod
    def zeros(cls, size: int, device: torch.device) -> Symmetric:
        """Return a matrix of zeros in fp32, (size, size)."""
        all_own, rank = distributed.shards() == 1, distributed.rank()
        spans = enumerate(_spans(size))
        counts = [span.stop - span.start if all_own or _owner(i) == rank else 0 for i, span in spans]
        return cls(tuple(torch.zeros(count, size - STRIP * i, device=device) for i, count in enumerate(counts)))

    @property
    def size(self) -> int:
        """The number of rows, and of columns."""
        return self.strips[0].shape[1]

    @property
    def nbytes(self) -> int:
        """The bytes that are stored."""
        return sum(strip.nbytes for strip in self.strips) + (0 if self.diagonal is None else self.diagonal.nbytes)

    def add_products(self, rows: Float[Tensor, "count size"]) -> None:
        """Add X^T X to the matrix, where X are these rows; products and sums are computed in fp32."""
        with torch.autocast(rows.device.type, enabled=False):
            for span, strip in zip(_spans(self.size), self.strips, strict=True):
                if len(strip):
                    strip.addmm_(rows[:, span].T, rows[:, span.start :])

    def dense(self) -> Float[Tensor, "size size"]:
        """Return the whole matrix as a new tensor, fp32 (size, size); if processes divide it, on all at once."""
        matrix = self.strips[0].new_empty(self.size, self.size, dtype=torch.float32)
        root = None if self.diagonal is None else self.diagonal.sqrt()
        for i, (span, strip) in enumerate(zip(_spans(self.size), self.strips, strict=True)):
            whole = strip if len(strip) else strip.new_empty(span.stop - span.start, self.size - span.start)
            rows = sharding.broadcast(whole, _owner(i)).float()
            matrix[span, span.start :] = rows if root is None else rows * root[span, None] * root[span.start :]
            matrix[span.stop :, span] = matrix[span, span.stop :].T
        if self.diagonal is not None:
            matrix.diagonal().copy_(self.diagonal)
        return matrix

    def block(self, channels: Int[Tensor, " n"]) -> Float[Tensor, "n n"]:
        """Return the rows and columns of some channels as a new tensor, fp32 (n, n).

        The elements are those of `dense`; of what is stored, only the rows of these channels are read. If processes
        divide the matrix, all call this at once.
        """
        ascending, places = channels.sort()
        if not torch.equal(ascending, channels):
            back = places.argsort()
            return self.block(ascending)[back][:, back]
        if len(channels) == self.size:
            return self.dense()
        matrix = self.strips[0].new_zeros(len(channels), len(channels), dtype=torch.float32)
        root = None if self.diagonal is None else self.diagonal[channels].sqrt()
        ends = torch.searchsorted(channels, torch.tensor([span.stop for span in _spans(self.size)])).tolist()
        first = 0
        for number, (strip, last) in enumerate(zip(self.strips, ends, strict=True)):
            within = channels - number * STRIP
            if len(strip):
                rows = strip[within[first:last]][:, within[first:]].float()
                matrix[first:last, first:] = rows if root is None else rows * root[first:last, None] * root[first:]
                matrix[last:, first:last] = matrix[first:last, last:].T
            first = last
        sharding.add_(matrix)
        if self.diagonal is not None:
            matrix.diagonal().copy_(self.diagonal[channels])
        return matrix

    def main_diagonal(self) -> Float[Tensor, " size"]:
        """Return the diagonal, fp32 (size,); if processes divide the matrix, on all at once."""
        if self.diagonal is not None:
            return self.diagonal
        diagonal = self.strips[0].new_zeros(self.size)
        for span, strip in zip(_spans(self.size), self.strips, strict=True):
            if len(strip):
                diagonal[span] = strip.diagonal()
        sharding.add_(diagonal)
        return diagonal

    def correlations(self) -> Symmetric:
        """Return the matrix stored as correlations in fp16; it must be positive semi-definite."""
        diagonal = self.main_diagonal().clamp_min(0)
        scale = diagonal.rsqrt().masked_fill_(diagonal == 0, 0)
        spans = zip(_spans(self.size), self.strips, strict=True)
        return Symmetric(
            tuple((strip * scale[span, None][: len(strip)] * scale[span.start :]).half() for span, strip in spans),
            diagonal,
        )


class SymmetricShelf(MutableMapping[str, Symmetric]):
    """Symmetric matrices by name, whose strips rest on a shelf: after a change in place one has to be put back."""

    def __init__(self, shelf: Shelf) -> None:
        self._strips, self._diagonals = shelf, dict[str, Tensor | None]()

    def __getitem__(self, name: str) -> Symmetric:
        diagonal, strips = self._diagonals[name], self._strips
        numbered = (f"{name}/{number}" for number in itertools.count())
        return Symmetric(tuple(strips[one] for one in itertools.takewhile(strips.__contains__, numbered)), diagonal)

    def __setitem__(self, name: str, matrix: Symmetric) -> None:
        self._diagonals[name] = matrix.diagonal
        self._strips.update((f"{name}/{number}", strip) for number, strip in enumerate(matrix.strips))

    def __delitem__(self, name: str) -> None:
        for number in range(len(self[name].strips)):
            del self._strips[f"{name}/{number}"]
        del self._diagonals[name]

    def __contains__(self, name: object) -> bool:
        return name in self._diagonals

    def __iter__(self) -> Iterator[str]:
        return iter(self._diagonals)

    def __len__(self) -> int:
        return len(self._diagonals)


class Symmetrics(Computed):
    """Symmetric matrices by name, which are made dense each time they are read from `stored`."""

    def __init__(self, stored: MutableMapping[str, Symmetric]) -> None:
        super().__init__(stored, lambda name: stored[name].dense())
        self.stored = stored

    @property
    def nbytes(self) -> int:
        """The bytes that are stored."""
        return sum(matrix.nbytes for matrix in self.stored.values())


def stored_elements(size: int) -> int:
    """Return the number of elements that are stored of a symmetric matrix, (size, size)."""
    return sum((span.stop - span.start) * (size - span.start) for span in _spans(size))


def _owner(number: int) -> int:
    """Return the process that holds a strip: in alternating direction, since strips become shorter."""
    turn, place = divmod(number, distributed.shards())
    return place if turn % 2 == 0 else distributed.shards() - 1 - place


def _spans(size: int) -> list[slice]:
    return [slice(first, min(first + STRIP, size)) for first in range(0, size, STRIP)]
