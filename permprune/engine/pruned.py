"""The result of a run: the pruned model in stored order, its record, and how it is written."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permprune.checkpoints.gathers import Gather
from permprune.checkpoints.io import load_written, write_weights
from permprune.checkpoints.licence import base_model_of, licence_of
from permprune.checkpoints.origin import origin_of
from permprune.checkpoints.patterns import recorded_patterns, require_patterns
from permprune.checkpoints.probe import Probe, check_outputs
from permprune.checkpoints.record import FORMAT, PrunedLayer, Record
from permprune.config import PruneConfig
from permprune.coupling.space import Coupling
from permprune.models.layers import Layer, dense_weights
from permprune.models.processors import Processor
from permprune.permuters.base import Solution
from permprune.pruning.folder import write_pruned
from permprune.pruning.hub import MESSAGE, push_to_hub
from permprune.pruning.masked import LayerMeasure
from permprune.pruning.problem import Orders, Problem
from permprune.pruning.stored import gather_places
from permprune.system.files import atomic_folder
from permprune.zoo.models import note

VERSIONED = ("permprune", "torch", "transformers", "scipy", "safetensors")
"""Packages whose versions the record contains."""


@dataclass(kw_only=True)
class Pruned:
    """A pruned model whose channels are in stored order, and how it was pruned.

    `solution` is the result of the search and `config` the config of the run. `tables` are the folded permutations by
    space, int64 (channels,), and `gathers` all reorderings that the model performs at run time. `layers` has, for each
    pruned layer, the share of squared saliency kept and the relative output error, in natural order (`kept_none`,
    `error_none`) and as pruned (`kept`, `error`). `probe` contains random inputs and the model's outputs for them
    before the orders were folded (`make_probe`). `reordered` are the outputs beside the logits whose channels are in
    the order of spaces in `tables`, with their names. `sample` contains a few weights before and after pruning (see
    `sample`); it is None if the model was read layer by layer.
    """

    model: PreTrainedModel
    solution: Solution
    config: PruneConfig
    tables: dict[str, Tensor]
    gathers: list[Gather]
    layers: list[PrunedLayer]
    probe: Probe
    reordered: dict[str, list[str]]
    sample: dict[str, Any] | None = None

    def record(self) -> Record:
        """Return the record of how the model was pruned; fields that `prune` does not measure are None."""
        origin, pruned = origin_of(self.model), [layer.name for layer in self.layers]
        name, before = origin.name, origin.record
        values = {
            "format": FORMAT,
            "version": importlib.metadata.version("permprune"),
            "model": name,
            "note": note(name),
            "settings": self.config.to_json(),
            "versions": {package: importlib.metadata.version(package) for package in VERSIONED},
            "layers": [asdict(layer) for layer in self.layers],
            "curve": [asdict(point) for point in self.solution.curve],
            "permutations": {space: table.tolist() for space, table in self.tables.items()},
            "gathers": [asdict(gather) for gather in self.gathers],
            "reordered": {**(before.reordered if before else {}), **self.reordered},
            "dense": asdict(dense_weights(self.model, pruned, self.config.exclude)),
            "sample": self.sample,
            "seconds": {"search": self.solution.seconds},
            "base_model": before.base_model if before else base_model_of(self.model, name),
            "license": (before and before.license) or licence_of(name),
        }
        return Record.of(values)

    def save_pretrained(self, folder: str | Path, processor: Processor | None = None) -> None:
        """Write the model to a folder that `load` and `verify` accept, as `prune_to_folder` does.

        The folder contains the config, the weights in the data type in which they were read, the processor, the record,
        the probe, a report and a model card. `folder` must not exist; it is created when all files are complete. Raises
        `PermpruneError` if the weights were changed after pruning; use `permprune.save` to write such a model.
        """
        record = self.record()
        trained = "if you have trained it since, write it with permprune.save"
        check_outputs(self.model, self.probe, "this model", trained)
        require_patterns(self.model, recorded_patterns(self.model, record.layers))
        weights = partial(write_weights, self.model, processor, origin_of(self.model).dtype)
        with atomic_folder(Path(folder)) as filled:
            write_pruned(record, self.probe, weights, filled, load=partial(load_written, self.model))

    def push_to_hub(
        self,
        repo_id: str,
        processor: Processor | None = None,
        *,
        private: bool | None = None,
        token: str | None = None,
        endpoint: str | None = None,
        revision: str | None = None,
        message: str = MESSAGE,
    ) -> str:
        """Write the model to a temporary folder as `save_pretrained` does, and upload it to the Hugging Face Hub.

        The options are as in `permprune.push_to_hub`. The model card shows how to load the model from the Hub. Returns
        the URL of the repository. Raises `PermpruneError`.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder, processor)
            return push_to_hub(
                folder,
                repo_id,
                private=private,
                token=token,
                endpoint=endpoint,
                revision=revision,
                message=message,
            )


def beside_natural(measures: list[LayerMeasure], natural: list[LayerMeasure]) -> list[PrunedLayer]:
    """Combine the measures of each layer as pruned with those in natural order."""
    return [
        PrunedLayer(**asdict(own), kept_none=before.kept, error_none=before.error)
        for own, before in zip(measures, natural, strict=True)
    ]


def new_gathers(
    coupling: Coupling, problems: list[Problem], orders: Orders, layers: Mapping[str, Layer]
) -> dict[str, Gather]:
    """Return the gathers that a pruned model needs, by problem; natural orders need none.

    `layers` are the pruned layers by name.
    """
    sites = {site.name: site for site in coupling.sites}
    found = {}
    for problem in problems:
        order = orders[problem.name]
        if problem.space or torch.equal(order, problem.identity()):
            continue
        output, inputs = gather_places(sites[problem.site], [layers[part.layer] for part in problem.parts])
        found[problem.name] = Gather(problem.site, output, inputs, order.tolist())
    return found
