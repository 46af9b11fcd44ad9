"""The settings of a pruned key/value cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from permprune.errors import PermpruneError
from permprune.options import Natural, replace_fields, require_fields
from permprune.pattern import Pattern

DENSE = "dense"
"""The pattern of states that keep all channels."""

RECOVERIES = ("zeros", "sign")

DTYPES = {
    "auto": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
"""The types of kept values by name; "auto" is the type in which the model computes."""


@dataclasses.dataclass(frozen=True)
class KVConfig:
    """How a pruned cache stores past tokens.

    Raises `PermpruneError` for a value out of range.
    """

    keys: str = "2:4"
    """The N:M pattern of the keys along the channels of a head, or "dense"; M may be all of the channels."""

    values: str = "2:4"
    """The N:M pattern of the values, or "dense"."""

    _: dataclasses.KW_ONLY

    recovery: str = "sign"
    """What attention reads in place of a pruned channel: "zeros", or "sign": the channel's sign, stored as one bit,
    times its typical magnitude, times one number for each token and head."""

    dtype: str = "auto"
    """The type of kept values: "fp32", "bf16", "fp16", "int8" with one scale for each token and head, or "auto"."""

    window: Natural = 32
    """The newest tokens, which stay whole. Tokens are packed 8 at a time, so that up to 7 more are whole."""

    sinks: Natural = 4
    """The first tokens, which stay whole: attention sinks (Xiao et al. 2024, arXiv 2309.17453)."""

    def __post_init__(self) -> None:
        require_fields(self)
        for text in (self.keys, self.values):
            pattern_named(text)
        if self.recovery not in RECOVERIES:
            raise PermpruneError(f'unknown recovery "{self.recovery}": choose {" or ".join(RECOVERIES)}')
        if self.dtype not in DTYPES:
            raise PermpruneError(f'a cache cannot store "{self.dtype}": choose {", ".join(DTYPES)}')

    def replace(self, **changes: Any) -> KVConfig:
        """Return a copy with other values. Raises `PermpruneError` for an unknown field."""
        return replace_fields(self, changes, "a cache has no setting")


def pattern_named(text: str) -> Pattern | None:
    """Return the pattern of a text "N:M"; None for "dense". Raises `PermpruneError` for anything else."""
    return None if text == DENSE else Pattern.parse(text)
