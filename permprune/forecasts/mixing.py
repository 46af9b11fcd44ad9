"""The cost of choosing the patterns of a mix (`permprune.budget`)."""

from __future__ import annotations

from collections.abc import Sequence

from permprune.budget.allocate import EXAMPLES, POINTS, START, differentiated
from permprune.budget.asked import parse_candidates
from permprune.budget.shares import ATTEMPTS
from permprune.config import PruneConfig
from permprune.forecasts.costs import stages_of
from permprune.forecasts.resources import Part, Phase, Stage, Work, Workload
from permprune.pattern import MIXED


def stages_of_mix(config: PruneConfig, run: Workload) -> list[Stage]:
    """Return the stage in which patterns are chosen; none if there is one pattern."""
    if config.pattern != MIXED:
        return []
    candidates = len(parse_candidates(config.candidates))
    gradients = run.gradient_work(EXAMPLES * run.examples_per_window) * len(differentiated(candidates))
    work = [gradients, run.loss_work(run.held_out) * (candidates + len(POINTS) + 2)]
    work += [stage.work for stage in stages_of(START, run) if stage.work is not None]
    parts = (
        *run.gradient.parts,
        run.summed(Part.GRADIENTS, EXAMPLES * run.examples_per_window, len(differentiated(candidates))),
    )
    return [Stage(Phase.PATTERNS, parts, sum(work, Work()))]


def stages_of_limit(config: PruneConfig, stages: Sequence[Stage]) -> list[Stage]:
    """Return the stage of the other runs of a limit of the loss, given the `stages` of one; none without a limit.

    What patterns cost is measured once for all of them.
    """
    if config.max_loss is None:
        return []
    works = [stage.work for stage in stages if stage.phase != Phase.PATTERNS]
    known = [work for work in works if work is not None]
    total = sum(known, Work()) * (ATTEMPTS - 1) if len(known) == len(works) else None
    return [Stage(Phase.OTHER_SHARES, max(stages, key=lambda stage: stage.bytes()).parts, total)]
