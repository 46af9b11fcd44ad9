"""The settings of a pruned key/value cache."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from permprune.errors import PermpruneError
from permprune.options import Natural, replace_fields, require_choice, require_fields
from permprune.pattern import DENSE, MIXED, PAIRED, Pattern
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch

    from permprune.kernels.attention.states import token_bytes

AUTO = "auto"
"""The pattern that is chosen by the width of the heads (`default_pattern`)."""

SHARE = 45 / 128
"""The bytes of a token with the default pattern and int8 values, relative to bf16: those of 2:4 for 64 channels."""

BITS = re.compile(r"([2-6])bit")
"""The texts that mean states of few bits in place of a pattern."""

RECOVERIES = ("zeros", "sign")

DTYPES = ("auto", "fp32", "bf16", "fp16", "int8")
"""The types of kept values by name; "auto" is the type in which the model computes."""


@dataclasses.dataclass(frozen=True)
class KVConfig:
    """How a pruned cache stores past tokens.

    Raises `PermpruneError` for a value out of range.
    """

    keys: str = AUTO
    """The N:M pattern of the keys along the channels of a head, or dense, or bits; auto is one group for a head.

    M may be all of the channels. "auto" is `default_pattern`, "dense" keeps all channels, and "4bit", or 2 to 6, all in
    so many bits (`permprune.kv.coding`)."""

    values: str = AUTO
    """The pattern of the values, or dense, or bits, or auto."""

    _: dataclasses.KW_ONLY

    recovery: str = "sign"
    """What attention reads in place of a pruned channel: zeros, or sign, which stores its sign.

    The sign, one bit, is multiplied by the channel's typical magnitude and one number for each token and head."""

    dtype: str = "int8"
    """The type of kept values of a pattern: int8, bf16, fp16, fp32, or auto for the model's.

    "int8" with one scale for each token and head loses hardly more than "bf16" at 0.6 of its bytes."""

    window: Natural = 32
    """The newest tokens, which are not pruned.

    Tokens are packed 8 at a time, so that up to 7 more are whole."""

    sinks: Natural = 4
    """The first tokens, which are not pruned: attention sinks (Xiao et al. 2024, arXiv 2309.17453)."""

    def __post_init__(self) -> None:
        require_fields(self)
        for text in (self.keys, self.values):
            if text not in (AUTO, DENSE, MIXED) and bits_of(text) is None:
                Pattern.parse(text)
        require_choice("recovery", self.recovery, RECOVERIES)
        require_choice("dtype", self.dtype, DTYPES)

    def replace(self, **changes: Any) -> KVConfig:
        """Return a copy with other values. Raises `PermpruneError` for an unknown field."""
        return replace_fields(self, changes, "a cache has no setting")


def bits_of(text: str) -> int | None:
    """Return the bits that the text of a setting means, such as "4bit"; None for patterns."""
    match = BITS.fullmatch(text)
    return int(match[1]) if match else None


def pattern_of(text: str, width: int) -> Pattern | None:
    """Return the pattern that a text means for heads of `width` channels; None for "dense" and bits.

    Raises `PermpruneError` unless it is "auto", "dense", bits, or an N:M whose M divides the width.
    """
    if text == DENSE or bits_of(text) is not None:
        return None
    pattern = default_pattern(width) if text == AUTO else Pattern.parse(text)
    if pattern.unit > 1:
        raise PermpruneError(f"{pattern} keeps pairs of weights, which a cache does not have: leave out the {PAIRED}")
    if not pattern.divides(width):
        raise PermpruneError(
            f"{pattern} does not divide the {width} channels of a head: choose an M that divides {width}, or "
            f"{default_pattern(width)}, the default"
        )
    return pattern


def default_pattern(width: int) -> Pattern:
    """Return the default pattern for heads of `width` channels: one group for the whole head.

    One group keeps the channels that matter most of each token, wherever they are. At the bytes of 2:4 it changes
    fewer answers about long contexts. N is the largest (but at least 1) with which a token with signs and int8
    values takes at most `SHARE` of its bytes in bf16: 29:64 and 62:128. The parts of fixed size weigh more in narrow
    heads, which keep less.
    """
    for kept in range(width - 1, 1, -1):
        if token_bytes(torch.int8, width, Pattern(kept, width), recovers=True) <= 2 * width * SHARE:
            return Pattern(kept, width)
    return Pattern(1, width)
