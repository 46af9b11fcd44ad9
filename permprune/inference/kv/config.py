"""The settings of a pruned key/value cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from permprune.errors import PermpruneError
from permprune.kernels.attention import part_sizes
from permprune.kernels.codes import INT5
from permprune.options import Natural, replace_fields, require_fields
from permprune.pattern import Pattern

AUTO = "auto"
"""The pattern that is chosen by the width of the heads (`default_pattern`)."""

DENSE = "dense"
"""The pattern of states that keep all channels."""

SHARES = {torch.int8: 45 / 128, INT5: 40 / 128}
"""The bytes of a token with the default pattern and values of a type, relative to bf16. For heads of 64 channels, int8
takes those of 2:4, and int5 those of dense states of four bits in groups of 32."""

RECOVERIES = ("zeros", "sign")

DTYPES = {
    "auto": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "int5": INT5,
}
"""The types of kept values by name; "auto" is the type in which the model computes."""


@dataclasses.dataclass(frozen=True)
class KVConfig:
    """How a pruned cache stores past tokens.

    Raises `PermpruneError` for a value out of range.
    """

    keys: str = AUTO
    """The N:M pattern of the keys along the channels of a head; M may be all of the channels. "auto" is
    `default_pattern`, and "dense" keeps all channels."""

    values: str = AUTO
    """The pattern of the values, likewise."""

    _: dataclasses.KW_ONLY

    recovery: str = "sign"
    """What attention reads in place of a pruned channel: "zeros", or "sign": the channel's sign, stored as one bit,
    times its typical magnitude, times one number for each token and head."""

    dtype: str = "int8"
    """The type of kept values: "int8" with one scale for each token and head, which loses hardly more than "bf16" at
    0.6 of its bytes; "int5" likewise, with which fewer bytes keep more channels; "fp32", "bf16", "fp16", or "auto"."""

    window: Natural = 32
    """The newest tokens, which stay whole. Tokens are packed 8 at a time, so that up to 7 more are whole."""

    sinks: Natural = 4
    """The first tokens, which stay whole: attention sinks (Xiao et al. 2024, arXiv 2309.17453)."""

    def __post_init__(self) -> None:
        require_fields(self)
        for text in (self.keys, self.values):
            if text not in (AUTO, DENSE):
                Pattern.parse(text)
        if self.recovery not in RECOVERIES:
            raise PermpruneError(f'unknown recovery "{self.recovery}": choose {" or ".join(RECOVERIES)}')
        if self.dtype not in DTYPES:
            raise PermpruneError(f'a cache cannot store "{self.dtype}": choose {", ".join(DTYPES)}')

    def replace(self, **changes: Any) -> KVConfig:
        """Return a copy with other values. Raises `PermpruneError` for an unknown field."""
        return replace_fields(self, changes, "a cache has no setting")


def pattern_of(text: str, width: int, dtype: str = KVConfig.dtype) -> Pattern | None:
    """Return the pattern that a text means for heads of `width` channels; None for "dense".

    Raises `PermpruneError` unless it is "auto", "dense" or an N:M whose M divides the width.
    """
    if text == DENSE:
        return None
    pattern = default_pattern(width, dtype) if text == AUTO else Pattern.parse(text)
    if not pattern.divides(width):
        raise PermpruneError(
            f"{pattern} does not divide the {width} channels of a head: choose an M that divides {width}, or "
            f"{default_pattern(width, dtype)}, the default"
        )
    return pattern


def default_pattern(width: int, dtype: str = KVConfig.dtype) -> Pattern:
    """Return the default pattern for heads of `width` channels: one group for the whole head.

    One group keeps the channels that matter most of each token, wherever they are. At the bytes of 2:4 it changes
    fewer answers about long contexts. N is the largest (but at least 1) with which a token with signs and values of
    type `dtype` takes at most `SHARES` of its bytes in bf16: 42:64 and 90:128 with int5, 29:64 and 62:128 with int8 and
    other types. The parts of fixed size weigh more in narrow heads, which keep less.
    """
    stored = INT5 if dtype == "int5" else torch.int8

    def size(kept: int) -> int:
        parts = part_sizes(stored, width, Pattern(kept, width), recovers=True)
        return sum(count * own.itemsize for count, own in parts.values())

    fitting = (n for n in range(2, width) if size(n) <= 2 * width * SHARES[stored])
    return Pattern(max(fitting, default=1), width)
