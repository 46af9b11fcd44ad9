"""Prune a model that does not fit in memory, layer by layer during one forward pass."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from permprune.calibration.moments import FEWEST, moments_of, warn_of_rare
from permprune.calibration.statistics import Statistics
from permprune.checkpoints.offload import Edit, attach, read_offloaded
from permprune.checkpoints.probe import make_probe
from permprune.checkpoints.record import PrunedLayer
from permprune.config import PruneConfig
from permprune.engine.pruned import Pruned, beside_natural, stored_form, stored_order
from permprune.engine.weights import Offloaded
from permprune.errors import PermpruneError
from permprune.forecasts.streamed import streamed_bytes
from permprune.kernels.search.masks import pack_mask, unpack_mask
from permprune.models.autocast import autocast
from permprune.models.experts import Routed
from permprune.models.forward import frozen, padding_of, run_model, short_inputs
from permprune.models.hooks import Done, hooked
from permprune.models.layers import Layer, require_finite
from permprune.models.narrow_weights import is_narrow
from permprune.permuters.base import LocalPermuter, Permuter, Run, Solution
from permprune.permuters.registry import permuter
from permprune.plan import Plan, calibration_examples, plan_run
from permprune.pruning.masked import LayerMeasure, MaskedLayers
from permprune.pruning.problem import Orders, Problem
from permprune.system import distributed, stages
from permprune.system.device import compute_device
from permprune.system.files import WorkFolder, gib, write_whole
from permprune.system.progress import log, stage, track
from permprune.system.search_state import Checkpoint, Journal

NATURAL, DECIDED = "natural", "decided"
"""The orders for which the masks are stored: the natural order and the one that was found."""


def require_streamable(model: nn.Module, plan: Plan) -> None:
    """Raise `PermpruneError` if a run layer by layer cannot read its examples, or needs more memory than is allowed."""
    if "pixel_values" in plan.measured:
        raise PermpruneError("images only calibrate a model in memory: raise --memory, or calibrate on text alone")
    tokens, length = plan.measured["input_ids"].numel(), plan.config.length
    needed = streamed_bytes(model, plan.outline, metric=plan.metric, tokens=tokens, length=length)
    if plan.config.memory is not None and needed > plan.config.memory:
        raise PermpruneError(
            f"even layer by layer this model takes about {gib(needed)}: raise --memory to that, or shorten --length"
        )


class Streamed(Offloaded):
    """A model whose weights stay on disk, and are read layer by layer.

    Calibration and search are one forward pass, which the first order that is shown starts; its method is that of the
    config. The masks of finished layers are stored in `folder`, one bit per weight, together with the state from which
    an interrupted run is resumed. Raises `PermpruneError` as `require_streamable` does.
    """

    unanswering = "the model was read layer by layer"

    def __init__(self, name: str, config: PruneConfig, work: WorkFolder) -> None:
        self._started, rank = time.monotonic(), f"rank-{distributed.rank()}"
        self.model, self.processor, self.stored, self.weights = read_offloaded(
            name, work.scratch / rank, task=config.task, trust_remote_code=config.trust_remote_code
        )
        examples = calibration_examples(self.model, self.processor, config)
        self.plan = plan_run(self.model, config, examples=examples, weights=self.weights.stored)
        require_streamable(self.model, self.plan)
        self.folder, self.half, self.seconds = work.path / rank, is_narrow(self.stored), 0.0
        self._searched = 0.0  # seconds of this process
        self.scratch, self.memory = work.scratch / "written", cast(int, config.memory)
        attach(self.model, self.weights)

    @contextmanager
    def dense(self) -> Iterator[None]:
        shown, self.weights.edit = self.weights.edit, None
        try:
            yield
        finally:
            self.weights.edit = shown

    def natural(self) -> list[LayerMeasure]:
        _, layers = self._solved
        stage(stages.NATURAL)
        self.weights.edit = self._masked(NATURAL)
        return [LayerMeasure(one.name, one.transposed, one.pattern, one.kept_none, one.error_none) for one in layers]

    def search(self, method: Permuter, run: Run) -> Solution:
        solution, _ = self._solved
        self.weights.edit = self._masked(DECIDED)
        return solution

    def update(self) -> None:
        """Nothing: methods that work layer by layer have no weight update."""

    def finish(self, solution: Solution, natural: list[LayerMeasure]) -> Pruned:
        probe = make_probe(self.model, short_inputs(self.model, self.plan.run.held_out))
        pruned = stored_form(self.plan, self.model, solution, layers=self._solved[1], probe=probe)
        masked, ordered = self._masked(DECIDED), stored_order(self.plan, pruned)
        self.weights.edit = lambda name, tensor: ordered(name, masked(name, tensor))
        return pruned

    @cached_property
    @torch.no_grad()
    def _solved(self) -> tuple[Solution, list[PrunedLayer]]:
        """The orders of the problems whose layers all read the same tensor, and what they keep of each layer.

        All other problems keep the natural order. Calibration is one forward pass of the dense model over all measured
        examples in one batch. Before the layers that read a tensor run, their problems are solved on that tensor. The
        loss is not used: `reconstruction` has uniform row weights instead of its Fisher information, and one candidate.
        """
        method = permuter(self.plan.config.permute)
        assert isinstance(method, LocalPermuter)
        problems = self._local()
        run = replace(self.plan.run, checkpoint=Checkpoint(self.folder, self.plan.run.checkpoint.settings))
        with Journal(method.checkpoint(run), method.name) as journal:
            self._walk(method, problems, journal)
        self.seconds = time.monotonic() - self._started - self._searched
        sites = journal.values.values()
        layers = {row["name"]: PrunedLayer(**row) for site in sites for row in site["layers"]}
        orders = {one.name: journal.tensors[one.name] for numbered in problems.values() for one in numbered.values()}
        solution = Solution(orders, math.fsum(site["seconds"] for site in sites))
        return solution, [layers[layer.name] for layer in self.plan.layers]

    def _walk(self, method: LocalPermuter, problems: dict[str, dict[int, Problem]], journal: Journal) -> None:
        """Run the model once and solve the problems at each tensor that layers read, except those in the journal."""
        plan = self.plan
        known = distributed.common(journal.values)  # all ranks take part in solving each problem
        readers = plan.outline.layers_by_input()
        waiting = {site: readers[site] for site in problems if site not in known}
        if not waiting:
            return
        stage(method.stages[0])

        def reach(layer: Layer, x: Tensor, routed: Routed | None) -> None:
            site = plan.sites[layer.name]
            layers = waiting.pop(site, None)
            if layers is None:  # already solved: another reader of the tensor, or a module that runs again
                return
            next(bar)
            with torch.autocast(device.type, enabled=False):
                journal.add(*self._decide(method, site, layers, problems[site], padding.real(x, routed, layer.owner)))
            if not waiting:
                raise Done

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
            suppress(Done),
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
        orders = network.each_problem(method.solver(network, self.plan.run), None, list(problems))
        seconds = time.monotonic() - started
        self._searched += seconds
        network.set_orders(orders)
        self._keep_masks(network, DECIDED)
        measures = [asdict(layer) for layer in beside_natural(network.measures(), natural)]
        return orders, {site: {"layers": measures, "seconds": seconds}}

    def _keep_masks(self, network: MaskedLayers, order: str) -> None:
        for name, mask in network.masks.items():
            packed = pack_mask(mask.cpu()).numpy().tobytes()
            write_whole(self.folder / f"{name}.{order}", partial(Path.write_bytes, data=packed))

    def _mask(self, name: str, order: str, shape: torch.Size) -> Tensor:
        packed = np.fromfile(self.folder / f"{name}.{order}", np.uint8).reshape(shape[0], -1)
        return unpack_mask(torch.from_numpy(packed), shape[1])

    def _masked(self, order: str) -> Edit:
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

    def _local(self) -> dict[str, dict[int, Problem]]:
        """Return the problems (by number) whose layers all read the same tensor, by site in the order of execution.

        Logs a warning for every other problem.
        """
        local: dict[str, dict[int, Problem]] = {site: {} for site in dict.fromkeys(self.plan.sites.values())}
        for number, problem in enumerate(self.plan.problems):
            site, *others = {part.site for part in problem.parts}
            if others:
                log.warning(
                    "%s keeps its natural order: it is read by layers that are not in memory together", problem.name
                )
            else:
                local[site][number] = problem
        return local

    def _network(self, site: str, layers: list[Layer], problems: list[Problem], x: Tensor) -> MaskedLayers:
        """Return a masked network of these layers only, with copies of their weights.

        `x`, (..., channels), is the tensor that they read. Raises `PermpruneError` if its second moments or a weight
        are not finite.
        """
        moments, held = moments_of(x, site, half=self.half), []
        for layer in layers:
            module = nn.Module()
            # experts are in memory while one of them runs, and the forward pass goes on with the dense weights
            weight = self.weights[layer.parameter] if layer.expert is None else layer.stored[layer.expert].clone()
            module.weight = nn.Parameter(weight, requires_grad=False)
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
