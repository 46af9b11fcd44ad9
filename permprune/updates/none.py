"""No update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from permprune.system.imports import on_first_use
from permprune.updates.base import Update

with on_first_use(globals()):
    from torch import Tensor

    from permprune.examples import Examples
    from permprune.pruning.network import PrunedNetwork


@dataclass(frozen=True)
class NoUpdate(Update):
    """Apply the masks only: every remaining weight keeps its value."""

    name: ClassVar[str] = "none"

    def run(self, network: PrunedNetwork, examples: Examples, masks: Mapping[str, Tensor] | None = None) -> None:
        """Leave the network as it is."""
