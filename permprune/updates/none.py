"""No update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from permprune.examples import Examples
from permprune.pruning.network import PrunedNetwork
from permprune.updates.base import Update


@dataclass(frozen=True)
class NoUpdate(Update):
    """Apply the masks only: every remaining weight keeps its value."""

    name: ClassVar[str] = "none"

    def run(self, network: PrunedNetwork, examples: Examples, masks: Mapping[str, Tensor] | None = None) -> None:
        """Leave the network as it is."""
