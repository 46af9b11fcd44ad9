"""What a benchmark measured: speed, size and memory of checkpoints, as records and files of figures keep them."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from permprune.checkpoints.schema import Malformed
from permprune.options import Count, Range

Duration = Annotated[float, Range(0, 1e9, open=True)]
Bytes = Annotated[int, Range(1, 2**60)]


@dataclasses.dataclass(frozen=True)
class Speed:
    """The speed of a model at one batch size and context length.

    Attributes:
        batch: Sequences that are generated side by side.
        context: Tokens of the prompt of each.
        first_token: Seconds from the prompt to the first token.
        next_token: Seconds from one token to the next, in the mean over the tokens after the first.
    """

    batch: Count
    context: Count
    first_token: Duration
    next_token: Duration

    @property
    def prefill(self) -> float:
        """Tokens of the prompts that are read in a second."""
        return self.batch * self.context / self.first_token

    @property
    def decode(self) -> float:
        """Tokens that are generated in a second, over all sequences."""
        return self.batch / self.next_token

    def fastest(self, other: Speed | None) -> Speed:
        """The shorter times of two measurements of the same."""
        if other is None:
            return self
        first, following = min(self.first_token, other.first_token), min(self.next_token, other.next_token)
        return dataclasses.replace(self, first_token=first, next_token=following)


@dataclasses.dataclass(frozen=True)
class BenchedModel:
    """One model as it ran.

    Attributes:
        name: The folder or the name, for a dense model with its type.
        dense: Whether it is the dense model.
        bytes: Bytes of all of its tensors, tied ones counted once.
        resident: Bytes of main memory that its process takes up after the measurements, PyTorch's own included.
        speeds: Its speed at each batch size and context length.
    """

    name: str
    dense: bool
    bytes: Bytes
    resident: Bytes
    speeds: list[Speed]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What `bench` measured, the dense model first, on `threads` threads of `device`."""

    threads: Count
    device: str
    rows: list[BenchedModel]

    def __post_init__(self) -> None:
        cells = {tuple((own.batch, own.context) for own in row.speeds) for row in self.rows}
        if not any(row.dense for row in self.rows) or len(cells) != 1 or not cells.pop():
            raise Malformed("rows must have a dense model, and speeds of the same batches and contexts")

    def to_json(self) -> dict[str, Any]:
        """The contents of a file of figures, tokens per second among them."""
        rows = [
            {
                **dataclasses.asdict(row),
                "speeds": [
                    {**dataclasses.asdict(own), "prefill": own.prefill, "decode": own.decode} for own in row.speeds
                ],
            }
            for row in self.rows
        ]
        return {"threads": self.threads, "device": self.device, "rows": rows}
