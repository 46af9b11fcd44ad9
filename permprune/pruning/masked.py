"""A model whose linear layers have masked weights, for any choice of channel orders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from permprune.calibration.statistics import Statistics
from permprune.errors import PermpruneError
from permprune.kernels.product.masked import MaskedWeight
from permprune.kernels.search.masks import apply_mask, kept_sum, pack_mask, unpack_mask, write_mask
from permprune.models.layers import Layer
from permprune.models.narrow_weights import NarrowWeights
from permprune.pattern import Pattern
from permprune.pruning.problem import Orders, Outline, Part, Problem
from permprune.pruning.running import RunningLayers
from permprune.saliency.metrics import Saliency, Scale
from permprune.system import distributed, sharding
from permprune.system.device import autocast_dtype
from permprune.system.progress import track
from permprune.system.shelf import Computed, Shelf

T = TypeVar("T")

SPAN = 2**21
"""The weights of a part whose slopes are computed at a time."""


class MaskedLayers(RunningLayers):
    """Layers that run with weight * mask, in the model's own channel order.

    The masks follow each layer's pattern with its columns in the chosen orders. The layers themselves stay in their own
    order (Li et al. 2026, "the pruned weight is permuted back"), so that any loss can be computed with them.

    The model keeps its dense weights; a masked weight is in memory only while its module runs. It runs with them until
    the network is deleted, the masked weights are written into the model (`write`), or the dense weights are restored
    (`restore`). Of tensors as large as the weights, it holds only the masks, one bit for each weight.

    `dense`, `scores`, `weights`, `masks` and `shown` are by layer, with tensors (rows, channels) that are computed when
    they are read. The weights that are masked are the dense ones, except those in `trained` (`set_weights`); the scores
    remain those of the dense weights. Masks keep the largest scores of each group, unless others are set (`set_bits`).
    The layers run with the masked weights, except those in `updated` (`show`).

    Rows are those that this process holds (`permprune.system.sharding`): what depends on all of them is summed over the
    processes.

    Weights in `trained` and `updated` rest on shelves at the place of `shelf`, by default on the device.

    The `outline` has the layers, the names of the tensors that they read, and the problems. `held` are the weights that
    are held in bf16; the network releases them when the dense weights are restored. Raises `PermpruneError` if a layer
    cannot be scored.
    """

    def __init__(
        self,
        outline: Outline,
        *,
        statistics: Statistics,
        saliency: Saliency,
        patterns: Mapping[str, Pattern],
        held: NarrowWeights,
        shelf: Shelf | None = None,
    ) -> None:
        super().__init__(outline.layers, held)
        self.problems, self.sites = outline.problems, outline.sites
        self.statistics, self.patterns = statistics, dict(patterns)
        self.shelf = Shelf() if shelf is None else shelf
        self.orders = self.identity()
        self._stored_columns: dict[str, Tensor] | None = None
        self.trained = self.shelf.another()
        self._show_masked()
        self._energies: dict[str, float] = {}
        self.scales = {name: self._scale(name, saliency) for name in self.sites}
        self._bits = {name: pack_mask(patterns[name].mask(score)) for name, score in self.scores.items()}
        self._refined: set[str] = set()
        self.attach()

    @property
    def dense(self) -> Mapping[str, Tensor]:
        """The model's weights; those that are held in bf16 are converted to fp32."""
        return Computed(self.sites, lambda name: self.layers[name].weight.to(self._type(name)))

    @property
    def scores(self) -> Mapping[str, Tensor]:
        """The saliency of the dense weights, fp32."""
        return Computed(self.sites, lambda name: self.scales[name].score(self.dense[name]))

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The weights that are masked."""
        return Computed(self.sites, lambda name: (self.trained if name in self.trained else self.dense)[name])

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Which weights are kept, bool."""
        return Computed(self.sites, lambda name: unpack_mask(self._bits[name], self.layers[name].shape[1]))

    @property
    def shown(self) -> Mapping[str, Tensor]:
        """The weights that the layers run with."""
        return Computed(self.sites, self._shown)

    def pattern_of(self, problem: Problem) -> Pattern:
        """The pattern of the layers that follow a problem's order.

        If they have several, it has the groups that contain those of all, and keeps about as many weights.
        """
        patterns = [self.patterns[part.layer] for part in problem.parts]
        if len({*patterns}) == 1:
            return patterns[0]
        rows = [self.layers[part.layer].shape[0] for part in problem.parts]
        kept = sum(pattern.density * count for pattern, count in zip(patterns, rows, strict=True)) / sum(rows)
        return Pattern.containing(patterns, kept)

    def rows_of(self, problem: Problem) -> int:
        """The number of weight rows that follow a problem's order."""
        return sum(self.layers[part.layer].shape[0] for part in problem.parts)

    def identity(self) -> Orders:
        """The natural order of every problem."""
        return {problem.name: problem.identity() for problem in self.problems}

    def each_problem(self, solve: Callable[[int, Problem], T], label: str | None) -> dict[str, T]:
        """Call `solve(number, problem)` for every problem and return the results by name.

        The problems are distributed over ranks and threads, the largest first, to balance the load; every rank gets all
        results. `solve` must not change the network. A progress bar shows `label` unless it is None.
        """
        numbered = list(enumerate(self.problems))
        if distributed.shards() == 1:  # otherwise all ranks solve the same problem at a time
            numbered.sort(key=lambda pair: -pair[1].size * self.rows_of(pair[1]))
        mine = distributed.share(numbered)
        results = distributed.each(lambda pair: solve(*pair), mine, next(iter(self.layers.values())).stored.device)
        tracked = track(results, label, len(mine)) if label else results
        return distributed.merge({problem.name: result for (_, problem), result in zip(mine, tracked, strict=True)})

    def stored_columns(self) -> dict[str, Tensor]:
        """Return each layer's columns in the order in which they will be stored, int64 (channels,).

        This is given by the current orders: groups of m neighbours follow the layer's pattern, and columns that no
        problem moves keep their positions.
        """
        stored = {name: torch.arange(layer.shape[1]) for name, layer in self.layers.items()}
        for problem in self.problems:
            for part in problem.parts:
                stored[part.layer][part.columns] = part.columns[self.orders[problem.name]]
        return stored

    def set_orders(self, orders: Orders) -> None:
        """Apply the masks of these orders; problems that are not in `orders` keep their current order."""
        touched: dict[str, list[Tensor]] = {}
        changed: Orders = {}
        self._show_masked()
        for problem in self.problems:
            order = orders.get(problem.name)
            if order is None or torch.equal(order, self.orders[problem.name]):
                continue
            changed[problem.name] = order.clone()
            for part in problem.parts:
                touched.setdefault(part.layer, []).append(part.columns[order])
        if changed:
            self.orders, self._stored_columns = self.orders | changed, None
        for name, moved in touched.items():
            score, mask = self.scores[name], self.masks[name]
            for columns in moved:
                write_mask(mask, score, columns, self.patterns[name])
            self._bits[name] = pack_mask(mask)

    def set_patterns(self, patterns: Mapping[str, Pattern]) -> None:
        """Mask the layers by other patterns, with the current orders; a layer without one runs with all its weights.

        Searches need a pattern for every layer.
        """
        before, self.patterns, stored = self.patterns, dict(patterns), self.stored_columns()
        self.updated.clear()
        for name in self.layers:
            if before.get(name) != patterns.get(name):
                self._bits[name] = pack_mask(self.mask_with(name, patterns.get(name), stored[name]))

    def mask_with(self, name: str, pattern: Pattern | None, columns: Tensor) -> Tensor:
        """Return the mask of a layer by its scores, bool (rows, channels); without a pattern it keeps all weights.

        `columns` are the layer's `stored_columns`.
        """
        mask = torch.ones_like(self.layers[name].weight, dtype=torch.bool)
        if pattern is not None:
            write_mask(mask, self.scores[name], columns, pattern)
        return mask

    @property
    def bits(self) -> dict[str, Tensor]:
        """The masks as `pack_mask` packs them, by layer; the tensors must not be changed."""
        return dict(self._bits)

    def set_bits(self, bits: Mapping[str, Tensor]) -> None:
        """Apply these masks, as `bits` returned them for the current orders, and those of the scores to other layers.

        An order that changes afterwards sets the masks of its columns by the scores again.
        """
        self._show_masked()
        stored = self.stored_columns()
        for name in self._refined - bits.keys():
            self._bits[name] = pack_mask(self.mask_with(name, self.patterns[name], stored[name]))
        self._bits |= {name: mask.to(self.layers[name].stored.device) for name, mask in bits.items()}
        self._refined = set(bits)

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Apply the masks to these weights (rows, channels), by layer, and to the dense weights of the other layers.

        They are converted to the types of the dense weights, and moved to their devices; those on a shelf stay there.
        """
        if isinstance(weights, Shelf):
            self.trained = weights
        else:
            self.trained = self.shelf.another()
            self.trained.update((name, weights[name].to(self.layers[name].stored)) for name in weights)
        self._show_masked()

    def blocks(self, part: Part, spans: Iterable[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the weights to mask and the scores of a part's columns, for one span of rows after the other.

        Both are new fp32 tensors (channels, rows).
        """
        dense = self.layers[part.layer].weight[:, part.span]
        trained = self.trained[part.layer][:, part.span] if part.layer in self.trained else None

        def transposed(matrix: Tensor) -> Tensor:
            return matrix.T.to(torch.float32, memory_format=torch.contiguous_format, copy=True)

        for rows in spans:
            weight = transposed(dense[rows])
            score = self.scales[part.layer].score(weight.T, rows, part.span).T
            yield weight if trained is None else transposed(trained[rows]), score

    def slopes_along(self, before: Orders, after: Orders, gradient: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the directional derivative of the loss along the step between two sets of orders, by problem.

        `gradient[layer]` is dLoss/dW_eff (rows, channels). With the gradient at the start of the step, the result is
        the first-order prediction of the change of the loss. With the gradient at its end, a negative result means that
        a longer step would lower the loss further, a positive one that the step was too long.
        """

        def slope(_: int, problem: Problem) -> float:
            orders = before[problem.name], after[problem.name]
            slopes = (self.part_slope(part, *orders, gradient[part.layer]) for part in problem.parts)
            return sharding.total(sum(slopes))[0]

        return self.each_problem(slope, None)

    def part_slope(self, part: Part, before: Tensor, after: Tensor, gradient: Tensor) -> float:
        """Return what the rows of a part add to the slope of its problem; `gradient` is that of the part's layer."""
        if torch.equal(before, after):
            return 0.0
        scale, pattern, total = self.scales[part.layer], self.patterns[part.layer], 0.0
        dense_weight = self.layers[part.layer].weight
        matrices = dense_weight, self.trained.get(part.layer, dense_weight), gradient
        size = max(1, SPAN // len(before))
        for rows in (slice(first, first + size) for first in range(0, len(gradient), size)):
            dense, weight, slope = (matrix[rows, part.span].float() for matrix in matrices)
            score = scale.score(dense, rows, part.span)
            sums = [kept_sum(score, weight, slope, order, pattern) for order in (before, after)]
            total += sums[1] - sums[0]
        return total

    def show(self, weights: Mapping[str, Tensor]) -> None:
        """Run with these weights without masking them, until orders or weights are set again.

        They are (rows, channels) in the network's own order, by layer; other layers keep their current weights. Of
        weights on a shelf, what it holds when a layer runs counts.
        """
        if isinstance(weights, Shelf):
            self.updated, self._borrows = weights, True
            return
        if self._borrows:
            borrowed = self.updated
            self._show_masked()
            self.updated.update(borrowed)
        self.updated.update(weights)

    def _show_masked(self) -> None:
        """Let all layers run with masked weights."""
        self.updated, self._borrows = self.shelf.another(), False

    def restore(self) -> None:
        """Let the model run with its dense weights; the network must not be used afterwards."""
        self.detach()
        self.held.release()

    def write(self) -> None:
        """Write the weights that are shown into the model; the network must not be used afterwards.

        Those that are held in bf16 remain so, and are rounded.
        """
        self.detach()
        for name, layer in self.layers.items():
            layer.weight.copy_(self.shown[name])

    def measures(self) -> list[LayerMeasure]:
        """Compare each layer with its current weights to the dense layer."""
        return [self._measure(name, layer) for name, layer in self.layers.items()]

    def _measure(self, name: str, layer: Layer) -> LayerMeasure:
        dense, shown, energy = self.dense[name], self.shown[name], self.scores[name].square_()
        sums = sharding.total(float((energy * shown.ne(0)).sum()), float(energy.sum()))
        del energy
        moments = self.statistics.moments[self.sites[name]]
        if name not in self._energies:  # a product as large as a pass over many tokens
            self._energies[name] = max(output_energy(dense, moments), 1e-30)
        error = output_energy(dense - shown, moments) / self._energies[name]
        kept = sums[0] / max(sums[1], 1e-30)
        return LayerMeasure(name, layer.transposed, str(self.patterns[name]), kept, error)

    def _scale(self, name: str, saliency: Saliency) -> Scale:
        try:
            return saliency.scale_of(self.dense[name], self.statistics.moments[self.sites[name]])
        except PermpruneError as error:
            raise PermpruneError(f"{name}: {error}") from error

    def _type(self, name: str) -> torch.dtype:
        """The type of a layer's weights where they are not held in bf16."""
        layer = self.layers[name]
        return self.held.types.get(layer.parameter, layer.stored.dtype)

    def _shown(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self._type(name)
        if name in self.updated:
            return self.updated[name].to(dtype)
        return apply_mask(self._unmasked(name), self._bits[name], dtype)

    def _unmasked(self, name: str) -> Tensor:
        """The weight that is masked, in the type in which it is held."""
        return self.trained[name] if name in self.trained else self.layers[name].weight

    def _multiplied(self, layer: Layer) -> Tensor | None:
        other = layer.expert is not None or layer.transposed or layer.name in self.updated
        pattern = self.patterns.get(layer.name)
        dtype = autocast_dtype(layer.stored.device)
        if other or pattern is None or (dtype is None and layer.stored.dtype != torch.float32):
            return None
        weight = self._unmasked(layer.name)
        if not MaskedWeight.fits(weight, pattern, dtype or torch.float32):
            return None
        if dtype is None:
            return MaskedWeight.of(weight, self._bits[layer.name])
        if self._stored_columns is None:
            self._stored_columns = self.stored_columns()
        return MaskedWeight.of(weight, self._bits[layer.name], self._stored_columns[layer.name])


@dataclass(frozen=True)
class LayerMeasure:
    """How close a pruned layer with its current weights is to the dense one.

    `kept` is the share of the squared scores that belongs to non-zero weights; `error` is the relative output error on
    the dense model's inputs, tr(E H E^T) / tr(W H W^T) with E = W - W_eff. `transposed` is whether the weight is stored
    as (inputs, outputs).
    """

    name: str
    transposed: bool
    pattern: str
    kept: float
    error: float


def output_energy(weight: Tensor, moments: Tensor) -> float:
    """Return the mean squared norm of a layer's outputs, tr(W H W^T).

    `weight` is (rows, channels), and `moments` are the second moments of its inputs, (channels, channels).
    """
    return sharding.total(float((weight.float() @ moments).mul_(weight).sum()))[0]
