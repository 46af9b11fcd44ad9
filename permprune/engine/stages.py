"""The stages of a session, in the order in which it makes them."""

from __future__ import annotations

from collections.abc import Iterable

from permprune.budget.shares import ATTEMPTS
from permprune.config import PruneConfig
from permprune.forecasts.mixing import OTHERS, PATTERNS
from permprune.forecasts.run import EVALUATED, Forecast
from permprune.pattern import MIXED
from permprune.permuters.base import Permuter
from permprune.permuters.registry import permuter
from permprune.system.stages import ALLOCATE, CALIBRATE, DENSE, MEASURE, NATURAL, PACK, READ, SPEED, UPDATE, WRITE
from permprune.updates.base import NoUpdate
from permprune.updates.registry import update

OF_FORECASTS = {
    "load": READ,
    "transcribe": CALIBRATE,
    "calibrate": CALIBRATE,
    PATTERNS: ALLOCATE,
    "update": UPDATE,
    "update: accept": UPDATE,
    "write": WRITE,
}
"""The stages of a run to which those of a forecast belong, beside the stages of a search."""


def stages_of_pruning(config: PruneConfig, *, packed: bool, timed: bool) -> list[str]:
    """The stages of `Session.prune`, of writing the model, and of measuring how fast it is."""
    searched, mixed = _searched(permuter(config.permute), config), [ALLOCATE] if config.pattern == MIXED else []
    tried = [CALIBRATE, *mixed, DENSE, NATURAL, *searched]
    if config.max_loss is not None:  # a last search finds its solution
        tried = [CALIBRATE, *[*mixed, *searched, MEASURE] * ATTEMPTS, DENSE, NATURAL, *searched]
    return [READ, *tried, MEASURE, WRITE, *([PACK] if packed else []), *([SPEED] if timed else [])]


def stages_of_attempts(methods: Iterable[Permuter], config: PruneConfig) -> list[str]:
    """The stages of a session that attempts methods one after the other."""
    mixed = [ALLOCATE] if config.pattern == MIXED else []
    return [READ, CALIBRATE, *mixed, DENSE, *(name for one in methods for name in (*_searched(one, config), MEASURE))]


def expected(forecast: Forecast) -> tuple[dict[str, float | None], tuple[str, ...]]:
    """Return the seconds of the stages of `Session.prune`, as far as known, and those that a time limit may end."""
    method, seconds = permuter(forecast.config.permute), dict(forecast.seconds)
    each = None if (evaluating := seconds.pop("evaluate")) is None else evaluating / EVALUATED
    by_stage: dict[str, float | None] = dict.fromkeys((DENSE, NATURAL, MEASURE), each)
    seconds.pop(OTHERS, None)  # stages that are made several times count as often
    by_stage |= dict.fromkeys(
        (*OF_FORECASTS.values(), PACK, SPEED), 0.0
    )  # to pack and to measure the speed take seconds
    for name, added in seconds.items():
        stage = OF_FORECASTS.get(name) or _stage_of(method, name)
        before = by_stage.get(stage, 0.0)
        by_stage[stage] = None if added is None or before is None else before + added
    return by_stage, method.stages if forecast.config.minutes else ()


def _stage_of(method: Permuter, name: str) -> str:
    """The stage of a search that a stage of its forecast belongs to."""
    start, *others = method.stages
    after, _, what = name.partition(": ")
    if after != method.name or not others:
        return start
    named = [stage for stage in others[1:] if what.startswith(stage.rpartition(", ")[2]) and what != "training"]
    return named[0] if named else others[0]


def _searched(method: Permuter, config: PruneConfig) -> list[str]:
    return [*method.stages, *([] if isinstance(update(config.update), NoUpdate) else [UPDATE])]
