"""The patterns that a mix may have and the budget that it must keep to, as a user gives them."""

from __future__ import annotations

from collections.abc import Iterable

from permprune.errors import PermpruneError
from permprune.pattern import DENSE, MIXED, Pattern

CANDIDATES = (DENSE, "7:8", "6:8", "5:8", "4:8", "3:8", "2:8")
"""The patterns that a layer of a mix may have. Of as many weights, groups of 8 lose less than groups of 4."""

KEPT = 0.5
"""The share of the weights that a mix keeps if no budget is given."""

Candidate = Pattern | None
"""A pattern, or None for a layer that stays dense."""


def parse_candidates(names: Iterable[str]) -> tuple[Candidate, ...]:
    """Return the candidates with these names, the sparsest first.

    Raises `PermpruneError` for anything but `DENSE` and N:M, and if there is no choice among them.
    """
    candidates = {None if name == DENSE else Pattern.parse(name) for name in names}
    if len(candidates) < 2:
        raise PermpruneError(f'a mix needs two candidates or more, as "{DENSE},6:8,2:4"')
    return tuple(sorted(candidates, key=lambda one: (density_of(one), 0 if one is None else one.m)))


def density_of(candidate: Candidate) -> float:
    """The share of the weights that a candidate keeps."""
    return 1.0 if candidate is None else candidate.density


def name_of(candidate: Candidate) -> str:
    """The name of a candidate."""
    return DENSE if candidate is None else str(candidate)


def frame_of(candidates: Iterable[Candidate], share: float) -> Pattern:
    """Return the pattern whose groups contain those of all candidates, and that keeps about this share of the weights.

    Orders are searched for its groups: one that is good for groups of 8 is as good for the groups of 4 inside them.
    """
    return Pattern.containing((candidate for candidate in candidates if candidate is not None), share)


def require_budget(pattern: str, candidates: tuple[str, ...], **budgets: float | None) -> None:
    """Raise `PermpruneError` for budgets that contradict each other, the pattern or the candidates."""
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) > 1:
        one, other = (option(name) for name in [*given][:2])
        raise PermpruneError(f"{one} and {other} are two budgets: give one of them")
    if pattern != MIXED:
        asked = [*map(option, given), *(["--candidates"] if candidates != CANDIDATES else [])]
        if asked:
            raise PermpruneError(
                f"{asked[0]} is for a mix of patterns: give --pattern {MIXED} with it, or leave it out"
            )
        return
    choices = parse_candidates(candidates)
    if given.keys() - {"keep"}:
        return
    share, (least, *_, most) = given.get("keep", KEPT), choices
    if share < density_of(least):
        raise PermpruneError(
            f"keep is {share:g}, but the sparsest candidate, {least}, keeps {density_of(least):g}: "
            "keep more, or give a sparser candidate"
        )
    if share >= density_of(most):
        raise PermpruneError(
            f"keep is {share:g}, and every layer would be {name_of(most)}: keep less, or give a denser candidate"
        )


def option(name: str) -> str:
    """The option of the command line for a setting."""
    return f"--{name.replace('_', '-')}"
