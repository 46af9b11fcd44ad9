"""The settings of the search for the channels of a pruned cache."""

from __future__ import annotations

import dataclasses

from permprune.errors import PermpruneError
from permprune.options import Count, Length, Positive, Seed, require, require_fields
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    from permprune.permuters.base import ScorePermuter
    from permprune.permuters.registry import score_permuter


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVSearch:
    """How the channels of a pruned cache are found, and on which text.

    With neither `budget` nor `max_loss` each head gets bits of its own within `BitErrors.usual`, unless the cache has
    patterns. Raises `PermpruneError` for a value out of range, and if both are given.
    """

    budget: float | None = None
    """Bytes of a packed token relative to 16-bit states, such as 0.25: each head gets bits of its own, in keys and in
    values, chosen by the error of the output of attention."""

    max_loss: Positive | None = None
    """The fewest `--bytes` with which perplexity on held-out calibration text grows by at most a share: 0.5%.

    In Python it is a share, such as 0.005. That text has as many windows as the evaluation, which are not observed."""

    order: str | ScorePermuter = "ria"
    """Search for the channel orders, where a head has several groups: none, random, ria or cp, with options after the
    name, such as cp:escapes=50."""

    calibration: str | None = None
    """The text to calibrate on: a file, or a data set id; by default the zoo's."""

    samples: Count = 16
    """Windows of text to calibrate on."""

    length: Length = 512
    """Tokens in a window of text."""

    seed: Seed = 0
    """Seed of all random numbers: the same one gives the same orders."""

    def __post_init__(self) -> None:
        require_fields(self)
        require("bytes", self.budget, Positive | None)
        if self.budget is not None and self.max_loss is not None:
            raise PermpruneError("--bytes and --max-loss are two ways to choose the bits of each head: leave out one")
        score_permuter(self.order)
