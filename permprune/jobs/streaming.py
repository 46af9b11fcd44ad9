"""Prune a model that does not fit in memory, layer by layer during one forward pass."""

from __future__ import annotations

import math
import time
from contextlib import closing, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from permprune.calibration.moments import FEWEST, moments_of, warn_of_rare
from permprune.calibration.statistics import Statistics
from permprune.checkpoints.offload import Edit, StoredWeights, attach
from permprune.checkpoints.probe import make_probe
from permprune.checkpoints.record import PrunedLayer
from permprune.coupling.fold import fold_parameter
from permprune.errors import PermpruneError
from permprune.forecasts.streamed import streamed_bytes
from permprune.models.attention import autocast
from permprune.models.experts import Routed
from permprune.models.forward import frozen, padding_of, run_model, short_inputs
from permprune.models.hooks import hooked
from permprune.models.layers import Layer, require_finite
from permprune.permuters.base import LocalPermuter, Solution
from permprune.permuters.registry import permuter
from permprune.pipeline import Pruned, beside_natural, new_gathers
from permprune.plan import Plan
from permprune.pruning.masked import MaskedLayers
from permprune.pruning.problem import Orders, Problem
from permprune.pruning.stored import fold_tables, reorder_columns, reordered_outputs
from permprune.system import distributed
from permprune.system.device import compute_device
from permprune.system.files import gib, write_whole
from permprune.system.progress import log, track
from permprune.system.search_state import Checkpoint, Journal

NATURAL, DECIDED = "natural", "decided"
"""The orders for which the masks are stored: the natural order and the one that was found."""


class Stream:
    """The search for orders on a model whose weights stay on disk.

    The masks of finished layers are stored in `folder`, one bit per weight, together with the state from which an
    interrupted run is resumed. With `half` second moments are rounded as in a run that holds the model (`calibrate`).
    `seconds` is the time that this process spent on searching. Raises `PermpruneError` if pruning layer by layer also
    needs more memory than the config allows.
    """

    def __init__(self, model: PreTrainedModel, weights: StoredWeights, plan: Plan, folder: Path, *, half: bool) -> None:
        if "pixel_values" in plan.measured:
            raise PermpruneError("images only calibrate a model in memory: raise --memory, or calibrate on text alone")
        tokens = plan.measured["input_ids"].numel()
        needed = streamed_bytes(model, plan.outline, metric=plan.metric, tokens=tokens, length=plan.config.length)
        if plan.config.memory is not None and needed > plan.config.memory:
            raise PermpruneError(
                f"even layer by layer this model takes about {gib(needed)}: raise --memory to that, or shorten --length"
            )
        self.model, self.weights, self.plan, self.folder, self.half = model, weights, plan, folder, half
        self.seconds = 0.0
        attach(model, weights)

    @torch.no_grad()
    def solve(self) -> Pruned:
        """Find the orders of the problems whose layers all read the same tensor; all others keep the natural order.

        Calibration is one forward pass of the dense model over all measured examples in one batch. Before the layers
        that read a tensor run, their problems are solved on that tensor. The loss is not used: `reconstruction` has
        uniform row weights instead of its Fisher information, and one candidate. Raises `PermpruneError`.
        """
        method = permuter(self.plan.config.permute)
        assert isinstance(method, LocalPermuter)
        problems = self._local()
        run = replace(self.plan.run, checkpoint=Checkpoint(self.folder, self.plan.run.checkpoint.settings))
        with Journal(method.checkpoint(run), method.name) as journal:
            self._walk(method, problems, journal)
        found = [problem for numbered in problems.values() for problem in numbered.values()]
        return self._pruned(found, journal)

    def _walk(self, method: LocalPermuter, problems: dict[str, dict[int, Problem]], journal: Journal) -> None:
        """Run the model once and solve the problems at each tensor that layers read, except those in the journal."""
        plan = self.plan
        known = distributed.common(journal.values)  # all ranks take part in solving each problem
        readers = plan.outline.layers_by_input()
        waiting = {site: readers[site] for site in problems if site not in known}
        if not waiting:
            return

        def reach(layer: Layer, x: Tensor, routed: Routed | None) -> None:
            site = plan.sites[layer.name]
            layers = waiting.pop(site, None)
            if layers is None:  # already solved: another reader of the tensor, or a module that runs again
                return
            next(bar)
            with torch.autocast(device.type, enabled=False):
                journal.add(*self._decide(method, site, layers, problems[site], padding.real(x, routed, layer.owner)))
            if not waiting:
                raise _AllDecided

        def is_rare(experts: nn.Module, index: int, tokens: int) -> bool:
            if tokens < FEWEST:
                rare.add((experts, index))
            return tokens < FEWEST

        rare: set[tuple[nn.Module, int]] = set()
        bar, device = track(waiting.copy(), method.name), compute_device(self.model)
        measured = plan.measured.to(device)
        padding = padding_of(self.model, measured)
        self.weights.edit = None
        with (
            closing(bar),
            suppress(_AllDecided),
            hooked(plan.layers, before=reach, whole=is_rare),
            frozen(self.model),
            autocast(device, plan.dtype),
        ):
            run_model(self.model, measured)  # the hooks do the work
        warn_of_rare(rare, plan.layers)
        if waiting:
            raise PermpruneError(f"no calibration token reaches {next(iter(waiting))}: exclude it, or give more text")

    def _decide(
        self, method: LocalPermuter, site: str, layers: list[Layer], problems: dict[int, Problem], x: Tensor
    ) -> tuple[Orders, dict[str, Any]]:
        """Solve the problems (by number) of the layers that read `x`, (..., channels), and store the masks.

        Returns the orders by problem, and a dict that maps the site to the measures of its layers and the seconds of
        the search.
        """
        network = self._network(site, layers, list(problems.values()), x)
        self._keep_masks(network, NATURAL)
        natural, started = network.measures(), time.monotonic()
        found = network.each_problem(method.solver(network, self.plan.run), None, list(problems))
        seconds = time.monotonic() - started
        self.seconds += seconds
        network.set_orders(found)
        self._keep_masks(network, DECIDED)
        measures = [asdict(layer) for layer in beside_natural(network.measures(), natural)]
        return found, {site: {"layers": measures, "seconds": seconds}}

    def _keep_masks(self, network: MaskedLayers, order: str) -> None:
        for name, mask in network.masks.items():
            packed = np.packbits(mask.cpu().numpy(), axis=1).tobytes()
            write_whole(self.folder / f"{name}.{order}", partial(Path.write_bytes, data=packed))

    def _mask(self, name: str, order: str, shape: torch.Size) -> Tensor:
        packed = np.fromfile(self.folder / f"{name}.{order}", np.uint8).reshape(shape[0], -1)
        return torch.from_numpy(np.unpackbits(packed, axis=1, count=shape[1])).bool()

    def _pruned(self, problems: list[Problem], journal: Journal) -> Pruned:
        plan = self.plan
        orders = {problem.name: journal.tensors[problem.name] for problem in problems}
        measures = {row["name"]: PrunedLayer(**row) for site in journal.values.values() for row in site["layers"]}
        tables = fold_tables(plan.coupling, problems, orders)
        self.weights.edit = self.masked(DECIDED)
        return Pruned(
            model=self.model,
            solution=Solution(orders, math.fsum(site["seconds"] for site in journal.values.values())),
            config=plan.config,
            tables=tables,
            gathers=list(new_gathers(plan.coupling, problems, orders, self._layers).values()),
            layers=[measures[layer.name] for layer in plan.layers],
            probe=make_probe(self.model, short_inputs(self.model, plan.run.held_out)),
            reordered=reordered_outputs(plan.coupling, tables),
        )

    def masked(self, order: str) -> Edit:
        """Return the edit that applies the masks of the `NATURAL` or the `DECIDED` orders to the weights, in place."""
        layers: dict[str, list[Layer]] = {}
        for layer in self.plan.layers:
            layers.setdefault(layer.parameter, []).append(layer)

        def edit(name: str, tensor: Tensor) -> Tensor:
            for layer in layers.get(name, []):
                weight = layer.part_of(tensor)
                weight *= self._mask(layer.name, order, weight.shape).to(weight.device)
            return tensor

        return edit

    def stored(self, pruned: Pruned) -> Edit:
        """Return the edit that makes the weights to be written: masked, folded, and with gathered columns reordered."""
        masked, ordered = self.masked(DECIDED), stored_order(self.plan, pruned)
        return lambda name, tensor: ordered(name, masked(name, tensor))

    @property
    def _layers(self) -> dict[str, Layer]:
        """The layers to prune, by name."""
        return {layer.name: layer for layer in self.plan.layers}

    def _local(self) -> dict[str, dict[int, Problem]]:
        """Return the problems (by number) whose layers all read the same tensor, by site in the order of execution.

        Logs a warning for every other problem.
        """
        found: dict[str, dict[int, Problem]] = {site: {} for site in dict.fromkeys(self.plan.sites.values())}
        for number, problem in enumerate(self.plan.problems):
            site, *others = {part.site for part in problem.parts}
            if others:
                log.warning(
                    "%s keeps its natural order: it is read by layers that are not in memory together", problem.name
                )
            else:
                found[site][number] = problem
        return found

    def _network(self, site: str, layers: list[Layer], problems: list[Problem], x: Tensor) -> MaskedLayers:
        """Return a masked network of these layers only, with copies of their weights.

        `x`, (..., channels), is the tensor that they read. Raises `PermpruneError` if its second moments or a weight
        are not finite.
        """
        moments, held = moments_of(x, site, half=self.half), []
        for layer in layers:
            module = nn.Module()
            # experts are in memory while one of them runs, and the forward pass goes on with the dense weights
            own = self.weights[layer.parameter] if layer.expert is None else layer.stored[layer.expert].clone()
            module.weight = nn.Parameter(own, requires_grad=False)
            held.append(replace(layer, module=module))
            require_finite(held[-1])
        uniform = {layer.name: layer.weight.new_ones(len(layer.weight)) for layer in held}
        return MaskedLayers(
            held,
            problems,
            dict.fromkeys(uniform, site),
            statistics=Statistics(moments, uniform, x.shape[:-1].numel()),
            saliency=self.plan.metric,
            patterns=dict.fromkeys(uniform, self.plan.pattern),
        )


def stored_order(plan: Plan, pruned: Pruned) -> Edit:
    """Return the edit that puts the channels of masked weights in stored order: folded, or reordered for gathers."""
    layers = {layer.name: layer for layer in plan.layers}
    gathered = {
        layers[part.layer].parameter: (layers[part.layer], pruned.solution.orders[problem.name])
        for problem in plan.problems
        if not problem.space and problem.name in pruned.solution.orders
        for part in problem.parts
    }

    def edit(name: str, tensor: Tensor) -> Tensor:
        fold_parameter(name, tensor, pruned.tables, plan.coupling)
        return reorder_columns(tensor, *gathered[name]) if name in gathered else tensor

    return edit


class _AllDecided(Exception):
    """Ends the forward pass when all problems are solved."""
