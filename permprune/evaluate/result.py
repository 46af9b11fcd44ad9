"""What every evaluation answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Result:
    """One measured `value` of `metric` on `task`, over `count` predictions; `stderr` its standard error."""

    task: str
    metric: str
    value: float
    count: int
    stderr: float | None = None

    def to_json(self) -> dict[str, str | float | int | None]:
        """The fields, ready for `json.dumps`."""
        return asdict(self)
