"""The results of a benchmark: speed, size and memory of checkpoints, as stored in records and JSON files."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from permprune.checkpoints.schema import Malformed
from permprune.options import Count, Range

Duration = Annotated[float, Range(0, 1e9, open=True)]
Bytes = Annotated[int, Range(1, 2**60)]


@dataclasses.dataclass(frozen=True)
class Speed:
    """The speed of a model that generates `batch` sequences in parallel, each after a prompt of `context` tokens.

    `first_token` is the time from the prompt to the first generated token in seconds, and `next_token` the mean time
    per token after it. `cache` are the bytes of the key/value cache at the end; 0 if they were not measured.
    """

    batch: Count
    context: Count
    first_token: Duration
    next_token: Duration
    cache: Annotated[int, Range(0, 2**60)] = 0

    @property
    def rate(self) -> float:
        """Generated tokens per second, over all sequences."""
        return self.batch / self.next_token

    def fastest(self, other: Speed | None) -> Speed:
        """Return the minimum of both times over this measurement and `other`; this one if `other` is None."""
        if other is None:
            return self
        first, following = min(self.first_token, other.first_token), min(self.next_token, other.next_token)
        return dataclasses.replace(self, first_token=first, next_token=following)


@dataclasses.dataclass(frozen=True)
class Throughput:
    """The speed of a model that does not continue text: an encoder, or a model of images or speech.

    It takes `seconds` for `batch` inputs, texts of `context` tokens, or images or speech, where `context` is 0. A model
    that transcribes writes a fixed number of tokens in them.
    """

    batch: Count
    context: Annotated[int, Range(0, 2**40)]
    seconds: Duration

    @property
    def rate(self) -> float:
        """Inputs per second."""
        return self.batch / self.seconds

    def fastest(self, other: Throughput | None) -> Throughput:
        """Return the faster one of this measurement and `other`; this one if `other` is None."""
        return self if other is None or self.seconds <= other.seconds else other


@dataclasses.dataclass(frozen=True)
class BenchedModel:
    """The measurements of one model.

    `name` is its folder or name, followed by the data type of the dense model and by the folder of the pruned key/value
    cache; `dense` tells whether it is the dense model with a dense cache. `bytes` are those of all tensors, tied ones
    counted once, and `resident` those of its process after the measurements, including PyTorch itself. `speeds` has the
    speed at each batch size and context length; those of all models are of the same type.
    """

    name: str
    dense: bool
    bytes: Bytes
    resident: Bytes
    speeds: list[Throughput | Speed]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The result of `bench`: one row per model, the dense model first.

    `threads` is the number of threads of each process and `device` is "CPU" or "GPU". Raises `Malformed` if no row is
    that of a dense model, or if the rows differ in batch sizes, context lengths and type of speeds, or have none.
    """

    threads: Count
    device: str
    rows: list[BenchedModel]

    def __post_init__(self) -> None:
        cells = {tuple((type(speed), speed.batch, speed.context) for speed in row.speeds) for row in self.rows}
        if not any(row.dense for row in self.rows) or len(cells) != 1 or not cells.pop():
            raise Malformed("rows must have a dense model, and speeds of the same batches and contexts")

    def to_json(self) -> dict[str, Any]:
        """Return the benchmark as JSON values, including tokens or inputs per second."""
        rows = [
            {**dataclasses.asdict(row), "speeds": [_with_rates(speed) for speed in row.speeds]} for row in self.rows
        ]
        return {"threads": self.threads, "device": self.device, "rows": rows}


def _with_rates(speed: Throughput | Speed) -> dict[str, Any]:
    if isinstance(speed, Throughput):
        return {**dataclasses.asdict(speed), "items": speed.rate}
    prompts = speed.batch * speed.context / speed.first_token
    return {**dataclasses.asdict(speed), "prefill": prompts, "decode": speed.rate}
