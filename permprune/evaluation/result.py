"""What every evaluation answers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


def higher_is_better(metric: str) -> bool:
    return metric.endswith(("accuracy", "agreement", "correlation", "F1", "score"))


@dataclass(frozen=True)
class Result:
    """One measured `value` of `metric` on `task`, over `count` predictions of `unit`; `stderr` its standard error."""

    task: str
    metric: str
    value: float
    count: int
    stderr: float | None = None
    unit: str = "examples"

    def to_json(self) -> dict[str, str | float | int | None]:
        """The fields, ready for `json.dumps`; the count goes by its unit."""
        fields = {name: value for name, value in asdict(self).items() if name not in ("count", "unit")}
        return {**fields, self.unit: self.count}


def gap_closed(value: float, dense: float, none: float, metric: str = "perplexity") -> float | None:
    """Share of the gap between the dense and the plainly pruned model, of perplexities in their logarithm.

    None where there is no gap.
    """
    if metric == "perplexity":
        value, dense, none = math.log(value), math.log(dense), math.log(none)
        return (none - value) / (none - dense) if none > dense else None
    return (value - none) / (dense - none) if dense != none else None
