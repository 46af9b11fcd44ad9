"""The stages of a session, in the order in which it makes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain

from permprune.budget.shares import ATTEMPTS
from permprune.config import PruneConfig
from permprune.forecasts.forecast import Forecast
from permprune.forecasts.resources import Phase, Stage
from permprune.forecasts.run import evaluations
from permprune.pattern import MIXED
from permprune.permuters.base import Permuter
from permprune.recipe import Recipe
from permprune.system.progress import (
    ALLOCATE,
    CALIBRATE,
    DENSE,
    MEASURE,
    NATURAL,
    PACK,
    READ,
    SPEED,
    TRAIN,
    TRAIN_BLOCKS,
    UPDATE,
    WRITE,
)

OF_PHASES = {
    Phase.LOAD: READ,
    Phase.TRANSCRIBE: CALIBRATE,
    Phase.CALIBRATE: CALIBRATE,
    Phase.PATTERNS: ALLOCATE,
    Phase.UPDATE: UPDATE,
    Phase.BLOCKS: TRAIN_BLOCKS,
    Phase.TRAINING: TRAIN,
    Phase.WRITE: WRITE,
    Phase.PACK: PACK,
}
"""The stages of a run to which the phases of a forecast belong, beside those of a search."""


def stages_of_pruning(config: PruneConfig, *, packed: bool, timed: bool) -> list[str]:
    """The stages of `Session.prune`, of writing the model, and of measuring how fast it is."""
    searched, mixed = config.recipe.stages, [ALLOCATE] if config.pattern == MIXED else []
    tried = [CALIBRATE, *mixed, DENSE, NATURAL, *searched]
    if config.max_loss is not None:  # a last search finds its solution
        tried = [CALIBRATE, *[*mixed, *searched, MEASURE] * ATTEMPTS, DENSE, NATURAL, *searched]
    packing = [PACK, *([MEASURE] if config.rounded else [])]
    return [READ, *tried, MEASURE, WRITE, *(packing if packed else []), *([SPEED] if timed else [])]


def stages_of_attempts(methods: Iterable[Permuter], config: PruneConfig) -> list[str]:
    """The stages of a session that attempts methods one after the other."""
    mixed = [ALLOCATE] if config.pattern == MIXED else []
    tried = [(*replace(config.recipe, order=order).stages, MEASURE) for order in methods]
    return [READ, CALIBRATE, *mixed, DENSE, *chain.from_iterable(tried)]


def expected(forecast: Forecast) -> tuple[dict[str, float | None], tuple[str, ...]]:
    """Return the seconds of the stages of `Session.prune`, as far as known, and those that a time limit may end."""
    recipe, seconds = forecast.config.recipe, forecast.seconds
    # those of a search that are not forecast do nothing, and to pack without solving and to measure the speed is short
    by_stage: dict[str, float | None] = dict.fromkeys((*recipe.stages, PACK, SPEED), 0.0)
    for stage in forecast.stages:
        taken = seconds[stage.name]
        if stage.phase == Phase.EVALUATE:
            by_stage |= dict.fromkeys((DENSE, NATURAL, MEASURE), taken and taken / evaluations(forecast.config))
        elif stage.phase != Phase.OTHER_SHARES:  # stages that are made several times count as often
            name = _stage_of(recipe, stage)
            before = by_stage.get(name, 0.0)
            by_stage[name] = None if taken is None or before is None else before + taken
    return by_stage, recipe.stages if forecast.config.minutes else ()


def _stage_of(recipe: Recipe, stage: Stage) -> str:
    """The stage of a run of a recipe that a stage of its forecast belongs to."""
    if not stage.method:  # the accept tests follow each change of the weights
        return recipe.stages[-1] if stage.phase == Phase.ACCEPT else OF_PHASES[stage.phase]
    start, *others = recipe.order.stages
    return others[0] if stage.method == recipe.order.name and others else start
