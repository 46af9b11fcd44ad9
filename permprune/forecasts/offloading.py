"""The memory of a run that offloads: what rests elsewhere, and what it has in hand where it computes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from permprune.calibration.symmetric import stored_elements
from permprune.forecasts.resources import Memory, Place, Stage, Workload
from permprune.models.layers import block_linears, blocks

RESTING = {
    "second moments", "sums of moments", "gradients", "trained weights", "best trained weights", "Adam's moments",
    "slopes of the largest problem", "compensated weights",
}  # fmt: skip
"""The parts of stages that rest elsewhere, by name, beside the weights of blocks."""

STEP = 9
"""Bytes for each weight of a layer that a step of Adam computes on a device: a mask, and four numbers in fp32 for each
of the half that is kept."""


FILES = 4
"""Half the number of files of weights that a run writes."""

BACKWARD = {"calibrate", "gradients", "training", "training at the end", "refinement"}
"""What stages with gradients are called."""


@dataclass(frozen=True)
class Offload:
    """What a run that offloads to a `place` holds of a model in blocks; sizes are numbers of weights.

    `layers` are all layers to prune, `block` those of the largest block, and `largest` is the largest layer. `width` is
    that of the widest input of a layer. Weights have type `held`, and activations type `dtype`; `on_device` is as in
    `Workload`.
    """

    place: Place
    layers: int
    block: int
    largest: int
    width: int
    held: torch.dtype
    dtype: torch.dtype
    on_device: bool

    @classmethod
    def of(cls, place: Place, model: PreTrainedModel, run: Workload) -> Offload:
        """Return what a run holds."""
        outline = run.outline
        inside = [{id(module) for module in block.modules()} for block in blocks(model)]
        sizes = [(id(layer.owner), layer.shape.numel()) for layer in block_linears(model)]
        return cls(
            place=place,
            layers=outline.weights,
            block=max(sum(size for owner, size in sizes if owner in own) for own in inside),
            largest=max(layer.shape.numel() for layer in outline.layers),
            width=max(outline.widths.values()),
            held=outline.dtype,
            dtype=run.dtype,
            on_device=run.on_device,
        )

    def stage(self, stage: Stage) -> Stage:
        """Return a stage of a run that holds everything as it is in one that offloads."""
        parts = [replace(part, place=self.place) if part.name in RESTING else part for part in stage.parts]
        weights = self.layers * self.held.itemsize
        parts = [replace(part, bytes=part.bytes - weights) if part.name == "weights" else part for part in parts]
        if self.place == "host":
            parts.append(Memory("weights of blocks", weights, "host"))
        return replace(stage, parts=(*parts, Memory("layers in hand", self._in_hand(stage))))

    def _in_hand(self, stage: Stage) -> int:
        named = {part.name for part in stage.parts}
        layer = self.largest * (self.held.itemsize + 4)  # as it is held, and masked
        if stage.name.rpartition(": ")[2] not in BACKWARD:
            return layer
        changed = 2 if "Adam's moments" in named else 1  # the weight and the moments, or the sum of the gradients
        gradient = self.largest * (4 + changed * self.held.itemsize)
        masked = 4 * (self.block - self.largest) if self.dtype == torch.float32 else 0  # others count as activations
        step = STEP * self.largest if "Adam's moments" in named and self.on_device else 0
        sums = 4 * stored_elements(self.width) if "sums of moments" in named else 0
        return max(layer, masked + gradient + step + sums)
