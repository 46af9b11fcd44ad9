"""A pattern for each layer of a calibrated model, within the budget of its config, and the plan that follows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from permprune.budget.allocate import Costs, Sensitivity
from permprune.budget.asked import KEPT, Candidate, parse_candidates
from permprune.checkpoints.record import Mix
from permprune.errors import PermpruneError
from permprune.evaluation.size import weight_bytes
from permprune.inference.pack import layer_bytes, other_bytes
from permprune.kernels.product.layout import LARGEST_GROUP
from permprune.plan import Plan
from permprune.pruning.network import PrunedNetwork
from permprune.system.progress import ALLOCATE, stage
from permprune.system.search_state import Checkpoint

P = TypeVar("P", bound=Plan)

STATE = "patterns"
"""The name of the state with the patterns that were chosen, and of the folder of the search for them."""


def sensitivity(plan: Plan, network: PrunedNetwork) -> Sensitivity:
    """Measure what the candidates of the config cost the layers of a network, which is that of the whole `plan`."""
    checkpoint = plan.run.checkpoint
    checkpoint_of_mix = Checkpoint(checkpoint.folder and checkpoint.folder / STATE, checkpoint.settings)
    run = replace(plan.run, checkpoint=checkpoint_of_mix, callbacks=())
    return Sensitivity(network, run, parse_candidates(plan.config.candidates), plan.pattern)


def choose_patterns(
    plan: P,
    network: PrunedNetwork,
    model: PreTrainedModel,
    *,
    measured: Callable[[], Sensitivity],
    keep: float | None = None,
) -> tuple[P, PrunedNetwork, Mix]:
    """Choose the patterns of a mix; returns the plan and the network of the layers that are pruned, and the choice.

    `network` has all layers of the `plan`, and `measured` returns what its patterns cost (`sensitivity`). Both can be
    used again, with another `keep`, which replaces the budget of the config. An interrupted run finds the patterns that
    it had chosen. Raises `PermpruneError` if no choice fits.
    """
    stage(ALLOCATE)
    folder = plan.run.checkpoint.folder
    if folder is not None and keep is not None:
        folder = folder / f"keep {keep:.4f}"
    checkpoint = Checkpoint(folder and folder / STATE, plan.run.checkpoint.settings | {"share": keep})
    chosen_mix = checkpoint.load_object(STATE, Mix)
    if chosen_mix is None:
        chosen_mix = measured().choose(costs_of(plan, model, keep))
        checkpoint.save_object(STATE, chosen_mix)
    patterns = chosen_mix.patterns
    if not patterns:
        raise PermpruneError("the budget leaves every layer dense: there is nothing to prune")
    outline = plan.outline.of([layer for layer in plan.layers if layer.name in patterns])
    settings = {**plan.run.checkpoint.settings, STATE: json.dumps(chosen_mix.layers, sort_keys=True)}
    run = replace(plan.run, checkpoint=Checkpoint(folder, settings), solved={})
    chosen = replace(plan, layers=[*outline.layers], problems=[*outline.problems], sites=dict(outline.sites), run=run)
    return chosen, network.restricted(outline, patterns), chosen_mix


def costs_of(plan: Plan, model: PreTrainedModel, keep: float | None = None) -> Costs:
    """Return what the candidates of the config take in each layer of a plan, and its budget."""
    config = plan.config
    candidates = parse_candidates(config.candidates)
    packs = plan.pattern.m <= LARGEST_GROUP
    if not packs and config.bytes is not None:
        raise PermpruneError(f"there is no packed form of groups of {plan.pattern.m}: give candidates with a smaller M")

    def size(layer: int, candidate: Candidate) -> int:
        return layer_bytes(model, plan.layers[layer], candidate if packs else None, dtype=config.packed)

    def table(entry: Sequence[Sequence[int]]) -> np.ndarray:
        return np.array(entry, dtype=np.int64)

    weights = [layer.weight.numel() for layer in plan.layers]
    kept = table([[count if one is None else count * one.n // one.m for one in candidates] for count in weights])
    sizes = table([[size(layer, one) for one in candidates] for layer in range(len(weights))])
    others = other_bytes(model, plan.layers, dtype=config.packed, head=config.packed_head) + _gather_bytes(plan)
    costs = Costs(candidates, kept, sizes, weights=sum(weights), others=others, limit=0)
    if config.bytes is None or keep is not None:
        return costs.keeping(next(share for share in (keep, config.keep, KEPT) if share is not None))
    limit = config.bytes * weight_bytes(model, torch.bfloat16) if config.bytes <= 1 else config.bytes
    return replace(costs, limit=int(limit), by_bytes=True)


def _gather_bytes(plan: Plan) -> int:
    """The bytes of the orders that modules read at run time, if every order that cannot be folded is stored."""
    owners = {layer.name: layer.owner_name for layer in plan.layers}
    gathered = [problem for problem in plan.problems if not problem.space]
    return sum(
        torch.int64.itemsize * problem.size * len({owners[part.layer] for part in problem.parts})
        for problem in gathered
    )
