"""Models side by side, as stored in records: their answers to the same examples, their size and their speed."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from permprune.options import Count, Range

SIDES = ("dense", "none", "pruned")
"""The models that are compared: the dense one, the one pruned in natural order, and the pruned one."""

Bytes = Annotated[int, Range(1, 2**60)]
Rate = Annotated[float, Range(0, 1e12, open=True)]


@dataclasses.dataclass(frozen=True)
class Example:
    """An example of the evaluation data, and the answers to it, by the names of `SIDES`.

    `expected` is the right answer, None if there is none. `picture` is a thumbnail of an image, a JPEG file in base64,
    and `pictures` are those of answers that are images.
    """

    given: str
    answers: dict[str, str]
    expected: str | None = None
    picture: str | None = None
    pictures: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Side:
    """The size and the speed of one model.

    `bytes` are those of its tensors in the checkpoint. `packed` are those in 16 bits, where the weights of pruned
    layers are packed; None if they have no packed form. `speed` is how much it does in a second, in the data type
    `dtype`; None if it was not measured.
    """

    bytes: Bytes
    packed: Bytes | None = None
    speed: Rate | None = None
    dtype: str | None = None


@dataclasses.dataclass(frozen=True)
class Showcase:
    """What a run shows of the models of `SIDES`.

    `kind` is what the answers are, a `permprune.showcase.base.Kind`; `note` says how they came about or, without
    `examples`, why there are none. Speeds are in `unit`, on `threads` threads of the `device`, "CPU" or "GPU".
    """

    kind: str
    note: str
    examples: list[Example]
    sides: dict[str, Side]
    unit: str = ""
    threads: Count = 1
    device: str = ""

    def resized(self, stored: int) -> Showcase:
        """Return what remains true of the pruned model when it is written in another form, with so many bytes."""
        pruned = dataclasses.replace(self.sides["pruned"], bytes=stored, speed=None, dtype=None)
        return dataclasses.replace(self, sides={**self.sides, "pruned": pruned})
