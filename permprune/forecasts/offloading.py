"""The memory of a run that offloads: what rests elsewhere, and what it has in hand where it computes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from permprune.calibration.symmetric import stored_elements
from permprune.forecasts.resources import Memory, Place, Stage, Workload
from permprune.models.layers import block_linears, blocks

KEPT = {"weights in training", "sums of gradients"}
"""The parts of stages, by name, that rest elsewhere and of which only what the masks keep does."""

RESTING = KEPT | {
    "sums of moments", "gradients", "Adam's moments", "slopes of the largest problem", "compensated weights",
    "trained weights",
}  # fmt: skip
"""The parts of stages that rest elsewhere, by name, beside the weights of blocks."""

ASIDE = {"second moments", "best trained weights"}
"""Those that are seldom read, which are put aside in files (`Shelf.put_aside`)."""

STEP = 9
"""Bytes for each weight of a layer that a step of Adam computes on a device: a mask, and four numbers in fp32 for each
of the half that is kept. It is more than what it takes to find the weights that are kept, as on a CPU."""

FILES = 4
"""Half the number of files of weights that a run writes."""

BACKWARD = {"calibrate", "gradients", "training", "training at the end", "refinement"}
"""What stages with gradients are called."""


@dataclass(frozen=True)
class Offload:
    """What a `run` that offloads holds of a model in blocks; the largest has `block` weights to prune."""

    run: Workload
    block: int

    @classmethod
    def of(cls, model: PreTrainedModel, run: Workload) -> Offload:
        """Return what a run holds."""
        inside = [{id(module) for module in block.modules()} for block in blocks(model)]
        sizes = [(id(layer.owner), layer.shape.numel()) for layer in block_linears(model)]
        return cls(run, max(sum(size for owner, size in sizes if owner in own) for own in inside))

    def stage(self, stage: Stage) -> Stage:
        """Return a stage of a run that holds everything as it is in one that offloads."""
        weights = self.run.outline.weights * self.run.outline.dtype.itemsize
        parts = [self._part(part, weights) for part in stage.parts]
        if self.run.rests == "host":
            parts.append(Memory("weights of blocks", weights, "host"))
        return replace(stage, parts=(*parts, Memory("layers in hand", self._in_hand(stage))))

    def _part(self, part: Memory, weights: int) -> Memory:
        """Return a part of a stage, given the bytes of the weights of blocks."""
        if part.name == "weights":
            return replace(part, bytes=part.bytes - weights)
        share = self.run.outline.pattern.density if part.name in KEPT else 1
        place: Place = "disk" if part.name in ASIDE else self.run.rests if part.name in RESTING else part.place
        return replace(part, bytes=round(part.bytes * share), place=place)

    def _in_hand(self, stage: Stage) -> int:
        outline, named = self.run.outline, {part.name for part in stage.parts}
        largest, held = max(layer.shape.numel() for layer in outline.layers), outline.dtype.itemsize
        layer = largest * (held + 4)  # as it is held, and masked
        if stage.name.rpartition(": ")[2] not in BACKWARD:
            return layer
        changed = 2 if "Adam's moments" in named else 1  # the weight and the moments, or the sum of the gradients
        gradient = largest * (4 + changed * held)
        masked = 4 * (self.block - largest) if self.run.dtype == torch.float32 else 0  # others count as activations
        found = 1 + 2 * outline.pattern.density * held  # a mask, and what it keeps, twice
        step = round(largest * (STEP if self.run.on_device else found)) if "Adam's moments" in named else 0
        sums = 4 * stored_elements(max(outline.widths.values())) if "sums of moments" in named else 0
        return max(layer, masked + gradient + step + sums)
