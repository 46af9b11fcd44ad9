"""A pattern for each layer of a calibrated model, within the budget of its config, and the plan that follows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from permprune.budget.allocate import Costs, Sensitivity
from permprune.budget.asked import KEPT, Candidate, parse_candidates
from permprune.checkpoints.record import Mix
from permprune.errors import PermpruneError
from permprune.evaluation.size import weight_bytes
from permprune.inference.pack import layer_bytes, other_bytes
from permprune.kernels.product.layout import LARGEST_GROUP
from permprune.system.progress import ALLOCATE, stage
from permprune.system.search_state import Checkpoint

if TYPE_CHECKING:
    from permprune.engine.held import Prepared

STATE = "patterns"
"""The name of the state with the patterns that were chosen, and of the folder of the search for them."""


def sensitivity(prepared: Prepared) -> Sensitivity:
    """Measure what the candidates of the config cost the layers of a prepared model."""
    checkpoint = prepared.run.checkpoint
    checkpoint_of_mix = Checkpoint(checkpoint.folder and checkpoint.folder / STATE, checkpoint.settings)
    run = replace(prepared.run, checkpoint=checkpoint_of_mix, callbacks=())
    return Sensitivity(prepared.network, run, parse_candidates(prepared.config.candidates), prepared.outline.pattern)


def choose_patterns(
    prepared: Prepared, *, measured: Callable[[], Sensitivity], keep: float | None = None
) -> tuple[Prepared, Mix]:
    """Choose the patterns of a mix; returns the prepared model with the layers that are pruned, and the choice.

    `prepared` has all layers, and `measured` returns what patterns cost them (`sensitivity`). Both can be used again,
    with another `keep`, which replaces the budget of the config. An interrupted run finds the patterns that it had
    chosen. Raises `PermpruneError` if no choice fits.
    """
    stage(ALLOCATE)
    run = prepared.run
    folder = run.checkpoint.folder
    if folder is not None and keep is not None:
        folder = folder / f"keep {keep:.4f}"
    checkpoint = Checkpoint(folder and folder / STATE, run.checkpoint.settings | {"share": keep})
    chosen_mix = checkpoint.load_object(STATE, Mix)
    if chosen_mix is None:
        chosen_mix = measured().choose(costs_of(prepared, keep))
        checkpoint.save_object(STATE, chosen_mix)
    patterns = chosen_mix.patterns
    if not patterns:
        raise PermpruneError("the budget leaves every layer dense: there is nothing to prune")
    outline = prepared.outline.of([layer for layer in prepared.outline.layers if layer.name in patterns])
    settings = {**run.checkpoint.settings, STATE: json.dumps(chosen_mix.layers, sort_keys=True)}
    chosen = replace(
        prepared,
        outline=outline,
        run=replace(run, checkpoint=Checkpoint(folder, settings), solved={}),
        network=prepared.network.restricted(outline, patterns),
    )
    return chosen, chosen_mix


def costs_of(prepared: Prepared, keep: float | None = None) -> Costs:
    """Return what the candidates of the config take in each layer, and its budget."""
    config, model, layers = prepared.config, prepared.model, prepared.outline.layers
    candidates = parse_candidates(config.candidates)
    packs = (group := prepared.outline.pattern.m) <= LARGEST_GROUP
    if not packs and config.bytes is not None:
        raise PermpruneError(f"there is no packed form of groups of {group}: give candidates with a smaller M")

    def size(layer: int, candidate: Candidate) -> int:
        return layer_bytes(model, layers[layer], candidate if packs else None, dtype=config.packed)

    def table(entry: Sequence[Sequence[int]]) -> np.ndarray:
        return np.array(entry, dtype=np.int64)

    weights = [layer.weight.numel() for layer in layers]
    kept = table([[count if one is None else count * one.n // one.m for one in candidates] for count in weights])
    sizes = table([[size(layer, one) for one in candidates] for layer in range(len(weights))])
    others = other_bytes(model, layers, dtype=config.packed, head=config.packed_head) + _gather_bytes(prepared)
    costs = Costs(candidates, kept, sizes, weights=sum(weights), others=others, limit=0)
    if config.bytes is None or keep is not None:
        return costs.keeping(next(share for share in (keep, config.keep, KEPT) if share is not None))
    limit = config.bytes * weight_bytes(model, torch.bfloat16) if config.bytes <= 1 else config.bytes
    return replace(costs, limit=int(limit), by_bytes=True)


def _gather_bytes(prepared: Prepared) -> int:
    """The bytes of the orders that modules read at run time, if every order that cannot be folded is stored."""
    owners = {layer.name: layer.owner_name for layer in prepared.outline.layers}
    gathered = [problem for problem in prepared.outline.problems if not problem.space]
    return sum(
        torch.int64.itemsize * problem.size * len({owners[part.layer] for part in problem.parts})
        for problem in gathered
    )
