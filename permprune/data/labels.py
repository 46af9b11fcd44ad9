"""Conversion of a data set's labels to the model's class numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from permprune.errors import PermpruneError

SHOWN = 5


class Labels:
    """Converts labels to the class numbers of a model's config (`id2label`), or to scores if it has one output."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.names: dict[int, str] = {int(number): str(name) for number, name in (config.id2label or {}).items()}
        self.numbers = {name.casefold(): number for number, name in self.names.items()}

    def read(self, label: Any, place: str) -> float:
        """Convert a label, the name or number of a class, to the class number; for a model with one output, to a score.

        Names are compared without regard to case. `place` names the example in error messages. Raises `PermpruneError`
        if the label is missing or unknown to the model.
        """
        text = "" if label is None else str(label).strip()
        if not text or (text == "-1" and len(self.names) > 1):
            raise PermpruneError(
                f"{place} has no label: give labelled data, such as NAME@validation for a split of a data set"
            )
        number: float | None = self.numbers.get(text.casefold())
        if number is None:
            number = self._number({"true": "1", "false": "0"}.get(text.casefold(), text))
        if number is None:
            shown = ", ".join(list(self.names.values())[:SHOWN]) + (", ..." if len(self.names) > SHOWN else "")
            known = "scores" if len(self.names) == 1 else f"{shown} (0 to {len(self.names) - 1})"
            raise PermpruneError(f'{place} has the label "{text}", which the model does not know: it knows {known}')
        return number

    def tensor(self, labels: Sequence[Any], places: Sequence[str]) -> Tensor:
        """Convert the labels of examples with `read`: int64 (count,), or fp32 (count,) for scores."""
        dtype = torch.float32 if len(self.names) == 1 else torch.int64
        return torch.tensor([self.read(*pair) for pair in zip(labels, places, strict=True)], dtype=dtype)

    def named(self, label: Any, names: Sequence[str]) -> Any:
        """Convert a data set's class number to the class name, if the model has all of the data set's class `names`.

        The data set and the model may number the same classes differently. Otherwise returns `label` unchanged.
        """
        known = all(name.casefold() in self.numbers for name in names)
        return names[label] if known and isinstance(label, int) and 0 <= label < len(names) else label

    def _number(self, text: str) -> float | None:
        number = as_number(text)
        if number is None or len(self.names) == 1:
            return number
        return int(number) if number in self.names else None


def as_number(text: str) -> float | None:
    """The number that a text is; None if it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def row_label(
    row: Mapping[str, Any], columns: Sequence[str], names: Mapping[str, Sequence[str]], labels: Labels | None
) -> Any:
    """The label in the first of the `columns` that a data set's row has; None if it has none of them.

    `names` are the names of the classes by column; with `labels`, numbers of classes are converted to their names.
    """
    column = next((name for name in columns if name in row), "")
    label = row.get(column)
    return labels.named(label, names[column]) if labels and column in names else label
