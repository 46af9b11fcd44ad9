"""The weights and scores of a problem's rows, read a block at a time, with the second moments of their inputs.

Matrices are channels first, (channels, rows), so that a group's weights are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from permprune.pattern import Pattern
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    from torch import Tensor

    from permprune.kernels.search.masks import pruned_weights
    from permprune.pruning.masked import MaskedLayers
    from permprune.pruning.problem import Part, Problem
    from permprune.system.shelf import Shelf

BLOCK = 2**21
"""Number of weights that are read at a time: a matrix of them is 8 MiB in fp32. Smaller problems are read once."""


@dataclass
class Rows:
    """Rows of a problem that read the same input channels: those of one layer.

    `read` yields (weight, score), both (channels, rows), for one block of rows after the other, and `slopes` are the
    slopes of the blocks, by number. `pattern` is the layer's. Rows are scaled so that fisher is 1 in the model: the
    weight is multiplied by sqrt(fisher), the slope is divided by it. `coupling` is the covariance after this scaling,
    that is, the correlations (rows, rows), for which all rows have to be in one block; None if rows are treated as
    independent.
    """

    read: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    slopes: Shelf
    pattern: Pattern
    coupling: Tensor | None = None

    def add(self, slope: Tensor) -> None:
        """Add the slopes of the next block."""
        self.slopes[str(len(self.slopes))] = slope

    def coupled(self, x: Tensor) -> Tensor:
        """Multiply `x` (..., rows) by the correlations of the rows."""
        return x if self.coupling is None else x @ self.coupling

    def pruned(self, weight: Tensor, score: Tensor, groups: Tensor) -> Tensor:
        """Return the weights of a block that the pattern prunes, and 0 where it keeps one (`pruned_weights`).

        `groups` are those of the problem, int64 (count, M), where the pattern's M divides M.
        """
        return pruned_weights(weight, score, groups.reshape(-1, self.pattern.m), self.pattern)


@dataclass
class Bundle:
    """Rows that read the same input channels.

    `moments(channels)` returns these rows and columns of H, the second moments of the channels, and `diagonal` is the
    diagonal of H.
    """

    moments: Callable[[Tensor], Tensor]
    diagonal: Tensor
    rows: list[Rows]


def read_bundles(
    network: MaskedLayers,
    problem: Problem,
    fisher: dict[str, Tensor],
    gradient: Mapping[str, Tensor] | None,
    covariance: dict[str, Tensor] | None,
) -> list[Bundle]:
    """Return the bundles of a problem; the arguments are those of `QuadraticModel.of`."""
    parts_by_input: dict[tuple[str, int], list[Part]] = {}
    for part in problem.parts:
        parts_by_input.setdefault((part.site, int(part.columns[0])), []).append(part)
    small = problem.size * network.rows_of(problem) <= BLOCK

    def bundle(parts: list[Part]) -> Bundle:
        stored, site, columns = network.statistics.moments.stored, parts[0].site, parts[0].columns
        correlated = covariance is not None and all(part.layer in covariance for part in parts)
        rows = [
            _rows(
                network,
                part,
                fisher[part.layer],
                gradient=None if gradient is None else gradient[part.layer],
                covariance=covariance[part.layer] if covariance is not None and correlated else None,
                small=small,
            )
            for part in parts
        ]
        diagonal = stored[site].main_diagonal()[columns]
        return Bundle(lambda channels: stored[site].block(columns[channels]), diagonal, rows)

    return [bundle(parts) for parts in parts_by_input.values()]


def _rows(
    network: MaskedLayers,
    part: Part,
    fisher: Tensor,
    *,
    gradient: Tensor | None,
    covariance: Tensor | None,
    small: bool,
) -> Rows:
    """The rows of a layer at a part's columns; without `gradient` they have no slopes yet.

    The blocks of a `small` problem are read once.
    """
    root = fisher.clamp_min(1e-30).sqrt()
    size = len(root) if covariance is not None else max(1, BLOCK // len(part.columns))
    spans = [slice(first, first + size) for first in range(0, len(root), size)]

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        for span, (weight, score) in zip(spans, network.blocks(part, spans), strict=True):
            yield weight.mul_(root[span]), score

    blocks = list(read()) if small else None
    correlations = None if covariance is None else covariance / root[:, None] / root
    pattern = network.patterns[part.layer]
    rows = Rows(read if blocks is None else partial(iter, blocks), network.shelf.another(), pattern, correlations)
    if gradient is not None:
        columns = gradient[:, part.span]
        for span in spans:
            rows.add((columns[span].float() / -root[span, None]).T.contiguous().to(columns.dtype))
    return rows
