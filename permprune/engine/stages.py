"""The stages of a session, in the order in which it makes them."""

from __future__ import annotations

from collections.abc import Iterable

from permprune.budget.shares import ATTEMPTS
from permprune.config import PruneConfig
from permprune.forecasts.forecast import Forecast
from permprune.forecasts.resources import Phase, Stage
from permprune.forecasts.run import evaluations
from permprune.pattern import MIXED
from permprune.permuters.base import Permuter
from permprune.permuters.iterate import Iterative
from permprune.permuters.registry import permuter
from permprune.system.progress import ALLOCATE, CALIBRATE, DENSE, MEASURE, NATURAL, PACK, READ, SPEED, UPDATE, WRITE
from permprune.updates.methods import NoUpdate, update

OF_PHASES = {
    Phase.LOAD: READ,
    Phase.TRANSCRIBE: CALIBRATE,
    Phase.CALIBRATE: CALIBRATE,
    Phase.PATTERNS: ALLOCATE,
    Phase.UPDATE: UPDATE,
    Phase.WRITE: WRITE,
    Phase.PACK: PACK,
}
"""The stages of a run to which the phases of a forecast belong, beside those of a search."""

AFTER_ROUNDS = {Phase.REFINEMENT, Phase.COMPENSATION, Phase.BLOCKS, Phase.TRAINING}
"""The phases of a search that follow its rounds, each a stage of the same name."""


def stages_of_pruning(config: PruneConfig, *, packed: bool, timed: bool) -> list[str]:
    """The stages of `Session.prune`, of writing the model, and of measuring how fast it is."""
    searched, mixed = _searched(permuter(config.permute), config), [ALLOCATE] if config.pattern == MIXED else []
    tried = [CALIBRATE, *mixed, DENSE, NATURAL, *searched]
    if config.max_loss is not None:  # a last search finds its solution
        tried = [CALIBRATE, *[*mixed, *searched, MEASURE] * ATTEMPTS, DENSE, NATURAL, *searched]
    packing = [PACK, *([MEASURE] if config.rounded else [])]
    return [READ, *tried, MEASURE, WRITE, *(packing if packed else []), *([SPEED] if timed else [])]


def stages_of_attempts(methods: Iterable[Permuter], config: PruneConfig) -> list[str]:
    """The stages of a session that attempts methods one after the other."""
    mixed = [ALLOCATE] if config.pattern == MIXED else []
    return [READ, CALIBRATE, *mixed, DENSE, *(name for one in methods for name in (*_searched(one, config), MEASURE))]


def expected(forecast: Forecast) -> tuple[dict[str, float | None], tuple[str, ...]]:
    """Return the seconds of the stages of `Session.prune`, as far as known, and those that a time limit may end."""
    method, seconds = permuter(forecast.config.permute), forecast.seconds
    # those of a search that are not forecast do nothing, and to pack without solving and to measure the speed is short
    by_stage: dict[str, float | None] = dict.fromkeys((*method.stages, PACK, SPEED), 0.0)
    for stage in forecast.stages:
        taken = seconds[stage.name]
        if stage.phase == Phase.EVALUATE:
            by_stage |= dict.fromkeys((DENSE, NATURAL, MEASURE), taken and taken / evaluations(forecast.config))
        elif stage.phase != Phase.OTHER_SHARES:  # stages that are made several times count as often
            name = _stage_of(method, stage)
            before = by_stage.get(name, 0.0)
            by_stage[name] = None if taken is None or before is None else before + taken
    return by_stage, method.stages if forecast.config.minutes else ()


def _stage_of(method: Permuter, stage: Stage) -> str:
    """The stage of a run, with this search, that a stage of its forecast belongs to."""
    if not stage.method and stage.phase in OF_PHASES:
        return OF_PHASES[stage.phase]
    if stage.method == Phase.UPDATE:
        return UPDATE
    start, *others = method.stages
    if stage.method != method.name or not others or not isinstance(method, Iterative):
        return start
    return method.stage(stage.phase) if stage.phase in AFTER_ROUNDS else others[0]


def _searched(method: Permuter, config: PruneConfig) -> list[str]:
    return [*method.stages, *([] if isinstance(update(config.update), NoUpdate) else [UPDATE])]
