"""A model of which one block at a time is where it is computed, and the rest in the host's memory or on the disk."""

from __future__ import annotations

from typing import cast

from transformers import PreTrainedModel

from permprune.checkpoints.offload import StoredWeights, load_at_rest
from permprune.config import PruneConfig
from permprune.engine.sharded import Sharded
from permprune.forecasts.offloading import FILES
from permprune.system.files import WorkFolder
from permprune.system.shelf import Place, Shelf


class Offloading(Sharded):
    """A model whose weights are at rest while their modules do not run, and whose other tensors rest on shelves.

    Weights on the disk are read from the checkpoint. Raises `PermpruneError` for a checkpoint or data that cannot be
    used, and if the disk is full.
    """

    unanswering = "the weights were offloaded"

    def load_weights(self, model: PreTrainedModel, weights: StoredWeights) -> None:
        load_at_rest(model, weights, held=self.shelf.place == "host")

    def shelf_of(self, config: PruneConfig, work: WorkFolder) -> Shelf:
        return Shelf(cast(Place, config.offload), work.scratch)

    def files(self) -> int:
        return FILES
