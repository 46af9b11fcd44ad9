"""The settings of a pruned key/value cache."""

from __future__ import annotations

import dataclasses
from typing import Any

from permprune.errors import PermpruneError
from permprune.options import Natural, replace_fields, require_choice, require_fields
from permprune.pattern import MIXED, PAIRED, Pattern
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch

    from permprune.kernels.attention import codes
    from permprune.kernels.attention.states import part_sizes
    from permprune.system.device import dtype_named

AUTO = "auto"
"""The pattern that is chosen by the width of the heads (`default_pattern`)."""

DENSE = "dense"
"""The pattern of states that keep all channels. With "mixed" (`MIXED`), each head keeps a number of its own."""

SHARES = {"int8": 45 / 128, "int5": 40 / 128}
"""The bytes of a token with the default pattern and values of a type, relative to bf16. For heads of 64 channels, int8
takes those of 2:4, and int5 those of dense states of four bits in groups of 32."""

RECOVERIES = ("zeros", "sign")

DTYPES = ("auto", "fp32", "bf16", "fp16", "int8", "int5")
"""The types of kept values by name; "auto" is the type in which the model computes."""


@dataclasses.dataclass(frozen=True)
class KVConfig:
    """How a pruned cache stores past tokens.

    Raises `PermpruneError` for a value out of range.
    """

    keys: str = AUTO
    """The N:M pattern of the keys along the channels of a head, or dense; auto is one group for the whole head.

    M may be all of the channels. "auto" is `default_pattern`, and "dense" keeps all channels."""

    values: str = AUTO
    """The pattern of the values, or dense, or auto."""

    _: dataclasses.KW_ONLY

    recovery: str = "sign"
    """What attention reads in place of a pruned channel: zeros, or sign, which stores its sign.

    The sign, one bit, is multiplied by the channel's typical magnitude and one number for each token and head."""

    dtype: str = "int8"
    """The type of kept values: int8, int5, bf16, fp16, fp32, or auto for the model's.

    "int8" with one scale for each token and head loses hardly more than "bf16" at 0.6 of its bytes; with "int5" fewer
    bytes keep more channels."""

    window: Natural = 32
    """The newest tokens, which are not pruned.

    Tokens are packed 8 at a time, so that up to 7 more are whole."""

    sinks: Natural = 4
    """The first tokens, which are not pruned: attention sinks (Xiao et al. 2024, arXiv 2309.17453)."""

    def __post_init__(self) -> None:
        require_fields(self)
        for text in (self.keys, self.values):
            if text not in (AUTO, DENSE, MIXED):
                Pattern.parse(text)
        require_choice("recovery", self.recovery, RECOVERIES)
        require_choice("dtype", self.dtype, DTYPES)

    def replace(self, **changes: Any) -> KVConfig:
        """Return a copy with other values. Raises `PermpruneError` for an unknown field."""
        return replace_fields(self, changes, "a cache has no setting")


def stored_type(name: str) -> torch.dtype | None:
    """Return the type of kept values with a name of `DTYPES`; None for "auto"."""
    return codes.INT5 if name == "int5" else dtype_named(name)


def pattern_of(text: str, width: int, dtype: str = KVConfig.dtype) -> Pattern | None:
    """Return the pattern that a text means for heads of `width` channels; None for "dense".

    Raises `PermpruneError` unless it is "auto", "dense" or an N:M whose M divides the width.
    """
    if text == DENSE:
        return None
    pattern = default_pattern(width, dtype) if text == AUTO else Pattern.parse(text)
    if pattern.unit > 1:
        raise PermpruneError(f"{pattern} keeps pairs of weights, which a cache does not have: leave out the {PAIRED}")
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
    name = "int5" if dtype == "int5" else "int8"
    fitting = (n for n in range(2, width) if token_bytes(n, width, name) <= 2 * width * SHARES[name])
    return Pattern(max(fitting, default=1), width)


def token_bytes(kept: int, width: int, dtype: str, *, recovers: bool = True) -> int:
    """Return the bytes of a token of a head that keeps `kept` of `width` channels, one group, with values of `dtype`.

    `recovers` is whether pruned channels are recovered by their signs.
    """
    stored = stored_type(dtype)
    assert stored is not None, "a type by name"
    pattern = None if kept == width else Pattern(kept, width)
    return sum(count * own.itemsize for count, own in part_sizes(stored, width, pattern, recovers=recovers).values())
