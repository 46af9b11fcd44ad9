"""Reconstruction: swaps that lower each layer's own output error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from permprune.losses.objective import Objective
from permprune.options import Count, Natural
from permprune.permuters.base import LocalPermuter, Run, Solution
from permprune.permuters.bundles import BLOCK
from permprune.permuters.iterate import Landscape
from permprune.permuters.kept import ria_order, stacked_scores
from permprune.permuters.quadratic import QuadraticModel
from permprune.system.imports import on_first_use
from permprune.system.progress import log, track

with on_first_use(globals()):
    import torch
    from torch import Tensor

    from permprune.pruning.masked import MaskedLayers
    from permprune.pruning.network import PrunedNetwork
    from permprune.pruning.problem import Orders, Problem
    from permprune.system.distributed import shards
    from permprune.system.search_state import Journal

JITTER = 0.01
"""Relative noise on the scores from which further candidates start."""


@dataclass(frozen=True)
class Reconstruction(LocalPermuter):
    """Minimise tr(F E H E^T) of every layer: its output error on the calibration tokens, exact for any masks.

    E is the pruned part of the weight, H the second moments of the inputs, and F the diagonal of the output's Fisher
    information, which weights rows by the sensitivity of the loss. The search starts from the order that keeps the most
    score with the same row weights; then every group makes up to `swaps` swaps, each with the group that lowers the
    error most.

    The errors of single layers predict the network's loss poorly: orders with nearly the same error can differ much in
    perplexity. Each problem is therefore solved `candidates` times, from scores with 1 % of noise. The problems are
    divided into `shares` runs of neighbours, and each run takes the candidate with the lowest held-out loss.
    """

    name: ClassVar[str] = "reconstruction"
    divides_rows = True
    swaps: Natural = 6
    candidates: Count = 3
    shares: Count = 8

    def search(self, network: PrunedNetwork, run: Run) -> Solution:
        def solve(number: int, problem: Problem) -> Tensor:
            """Return the orders of all candidates, int64 (candidates, size)."""
            orders = []
            for candidate in range(self.candidates):
                generator = run.generator(number, candidate)
                orders.append(self.order(network, problem, generator, JITTER if candidate else 0.0))
            return torch.stack(orders)

        with Journal(self.checkpoint(run), self.name) as journal:
            solved = self.each(network, journal, solve)
            names = [problem.name for problem in network.problems]  # the same order for any number of processes
            candidates = [{name: solved[name][i] for name in names} for i in range(self.candidates)]
            return Solution(self._choose(network, run, candidates), journal.seconds)

    def order(self, network: MaskedLayers, problem: Problem, generator: torch.Generator, jitter: float = 0.0) -> Tensor:
        fisher = network.statistics.fisher
        energy = stacked_scores(network, problem, fisher).square_()
        _add_noise(energy, jitter, generator, network, problem)
        first = ria_order([energy].__iter__, network.pattern_of(problem))
        del energy  # as large as the problem
        model = QuadraticModel.of(network, problem, fisher, order=first)
        model.swap(generator, self.swaps)
        return model.order

    def _choose(self, network: PrunedNetwork, run: Run, candidates: list[Orders]) -> Orders:
        """Return the first candidate, except for the runs of problems in which another lowers the held-out loss."""
        landscape, best = Landscape(network, run, Objective()), candidates[0]
        network.set_orders(best)
        least = landscape.held_out_loss()
        problems = list(best)
        for share in track(torch.arange(len(problems)).chunk(self.shares), "choosing candidates"):
            for other in candidates[1:]:
                tried = best | {problems[i]: other[problems[i]] for i in share.tolist()}
                network.set_orders(tried)
                loss = landscape.held_out_loss()
                if loss < least:
                    best, least = tried, loss
        log.info("%s: held-out loss %.4f", self.name, least)
        return best


def _add_noise(
    energy: Tensor, jitter: float, generator: torch.Generator, network: MaskedLayers, problem: Problem
) -> None:
    """Multiply energies, (channels, rows), by random numbers, 1 with a standard deviation of `jitter`.

    They are drawn for the rows of all processes, as these have to draw the same.
    """
    count, held = 0, []
    for layer in (network.layers[part.layer] for part in problem.parts):
        held.append(torch.arange(count, count + layer.row_count)[layer.rows])
        count += layer.row_count
    rows = torch.cat(held) if shards() > 1 else slice(None)
    for block in energy.split(max(1, BLOCK // count)):
        block *= 1 + jitter * torch.randn(len(block), count, generator=generator)[:, rows].to(block)
