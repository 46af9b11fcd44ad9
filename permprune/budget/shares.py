"""The fewest weights with which a model keeps to a limit of its loss: a search over the share of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

FIRST = 0.7
"""The share that is tried first."""

ATTEMPTS = 4
"""The most shares that are tried, each in a whole run. Each refused on other data allows one more, up to as many."""

CLOSE = 0.02
"""The search ends where two shares that differ by no more than this are within the limit and beyond it."""

EXPONENTS = 1.0, 6.0
"""The range of k in the model loss = a * (1 - share)^k, which two shares determine; with one share k is `TYPICAL`."""

TYPICAL = 3.0

AIM = 0.8
"""The share of the limit that is aimed at: other data may say a little more."""

Tried = Sequence[tuple[float, float]]
"""The shares that were tried, with their losses."""


def next_share(tried: Tried, limit: float, least: float, most: float, refused: int = 0) -> float | None:
    """Return the share of the weights to try next, between `least` and `most`; None if the search is over.

    Losses fall as the share rises. The next share is that at which a power law through the two losses nearest to the
    limit is `AIM` times the limit, between the largest share beyond the limit and the smallest one within it.
    `refused` is the number of shares that were within the limit, but not on other data.
    """
    if not tried:
        return min(most, max(least, FIRST))
    beyond = max((share for share, loss in tried if loss > limit), default=least - CLOSE / 2)
    within = min((share for share, loss in tried if loss <= limit), default=most)
    if len(tried) >= ATTEMPTS + min(refused, ATTEMPTS) or within - beyond <= CLOSE:
        return None
    nearest = sorted(tried, key=lambda one: abs(math.log(_floored(one[1], limit) / limit)))[:2]
    share, loss = nearest[0]
    power = _power(nearest, limit) if len(nearest) == 2 else TYPICAL
    guess = 1 - (1 - share) * math.pow(AIM * limit / _floored(loss, limit), 1 / power)
    if within < most and guess > within - CLOSE / 2 and loss <= limit:
        return None
    return min(within - CLOSE / 2, max(beyond + CLOSE / 2, guess))


def _power(two: Tried, limit: float) -> float:
    (share, loss), (other, other_loss) = two
    rise = math.log(_floored(loss, limit) / _floored(other_loss, limit))
    return min(EXPONENTS[1], max(EXPONENTS[0], rise / math.log((1 - share) / (1 - other))))


def _floored(loss: float, limit: float) -> float:
    """A loss of which the logarithm can be taken: one that is hardly measurable, or negative, counts as a tenth."""
    return max(loss, limit / 10)
