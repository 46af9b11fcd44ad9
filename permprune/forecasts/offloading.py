"""The memory of a run that offloads: what rests elsewhere, and what it has in hand where it computes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from permprune.calibration.symmetric import stored_elements
from permprune.errors import PermpruneError
from permprune.forecasts.resources import Memory, Part, Phase, Stage, Work, Workload
from permprune.models.layers import block_linears, blocks
from permprune.models.narrow_weights import end_weights
from permprune.system.files import gib
from permprune.system.shelf import Place

KEPT = {Part.IN_TRAINING, Part.GRADIENT_SUMS}
"""The parts of stages that rest elsewhere and of which only what the masks keep does."""

RESTING = KEPT | {
    Part.MOMENT_SUMS, Part.GRADIENTS, Part.ADAM, Part.SLOPES, Part.TRAINED, Part.UPDATED,
}  # fmt: skip
"""The parts of stages that rest elsewhere, beside the weights of blocks."""

ASIDE = {Part.SECOND_MOMENTS, Part.BEST_TRAINED}
"""Those that are seldom read, which make room for others (`Shelf.put_aside`)."""

MARGIN = 1.1
"""The share of its forecast memory that is left to what does not rest on a device: forecasts may be 10 % too low."""

MEASURED = 4
"""Copies in fp32 of a layer's weights that are held while it is compared with the dense one, beside its moments."""

STEP = 7
"""Bytes for each weight of a layer that a step of Adam computes on a device: a mask, and three numbers in fp32 for each
of the half that is kept. It is more than what it takes to find the weights that are kept, as on a CPU."""

SCORED = 9
"""Bytes for each weight of a layer whose mask changes, beside the weight: its score, in fp32, also in the order of the
mask's groups, and the mask."""

FILES = 4
"""Half the number of files of weights that a run writes, at least."""

BACKWARD = {Phase.GRADIENTS, Phase.BLOCKS, Phase.TRAINING}
"""The phases with gradients, beside a calibration with Fisher information."""

ONE_BLOCK = {Part.BLOCK_SUMS, Part.BLOCK_OUTPUTS}
"""The parts of a calibration by blocks that are freed before its backward passes."""

PASSING = {Part.ACTIVATIONS, Part.LOGITS, Part.MODEL}
"""The parts of stages that are not there while layers are scored, or compared."""


def module_sizes(model: PreTrainedModel) -> Counter[int]:
    """The number of weights that can be pruned of each module that has any, by its id."""
    sizes = Counter[int]()
    for layer in block_linears(model):
        sizes[id(layer.owner)] += layer.shape.numel()
    return sizes


@dataclass(frozen=True)
class Offload:
    """What a `run` that offloads holds of a model in blocks.

    The largest block has `block` weights to prune, the largest module, which may be that of all experts, `module`, and
    the largest of the model's ends `end`.
    """

    run: Workload
    block: int
    module: int
    end: int

    @classmethod
    def of(cls, model: PreTrainedModel, run: Workload) -> Offload:
        """Return what a run holds."""
        inside = [{id(module) for module in block.modules()} for block in blocks(model)]
        sizes = module_sizes(model)
        block = max(sum(sizes[owner] for owner in modules & sizes.keys()) for modules in inside)
        return cls(run, block, max(sizes.values()), max((end.numel() for end, _ in end_weights(model)), default=0))

    def stages(
        self, stages: Sequence[Stage], memory: float, host: float
    ) -> tuple[tuple[Stage, ...], tuple[float, float, float]]:
        """Return the stages of a run that holds everything as they are in one that offloads, and its `Forecast.room`.

        `memory` and `host` are the bytes of the device and of the host that it may take. The room of the device is
        smaller while blocks are updated, if nothing rests there before. Raises `PermpruneError` if the host is too
        small for what always is there.
        """
        bare = [replace(stage, parts=tuple(self._held(stage))) for stage in stages]
        smaller = [stage.phase == Phase.UPDATE and not stage.holds(Part.TRAINED) for stage in stages]

        def spare(inside: bool) -> float:
            taken = (stage.bytes("device") for stage, own in zip(bare, smaller, strict=True) if own is inside)
            return max(0.0, memory - MARGIN * max(taken, default=0))

        device = spare(False)
        updating = min(device, spare(True))
        left = host - (needed := max(stage.bytes("host") for stage in bare))
        if left < 0:
            raise PermpruneError(
                f"the host needs {gib(needed)} beside the program: give --set offload=host: more, or disk"
            )
        room = [updating if own else device for own in smaller]
        offloaded = (self._at_rest(*each, left) for each in zip(bare, stages, room, strict=True))
        return tuple(offloaded), (device, left, device - updating)

    def _held(self, stage: Stage) -> Iterator[Memory]:
        """Yield the parts of a stage that do not rest elsewhere, and what it has in hand."""
        weights = self.run.outline.weights * self.run.outline.dtype.itemsize
        for part in stage.parts:
            if part.name not in RESTING | ASIDE:
                yield replace(part, bytes=part.bytes - weights) if part.name == Part.WEIGHTS else part
        if self.run.rests == "host":
            yield Memory("weights of blocks", weights, "host")
        yield Memory("layers in hand", self._in_hand(stage))

    def _at_rest(self, stage: Stage, whole: Stage, device: float, host: float) -> Stage:
        """Return a stage with the parts of the `whole` that rest, where so many bytes are left for them."""
        parts, moved, limited = [*stage.parts], Work(), host < math.inf
        resting = [part for part in whole.parts if part.name in RESTING | ASIDE]
        for part in sorted(resting, key=lambda part: part.name in ASIDE):
            share = self.run.outline.pattern.density if part.name in KEPT else 1
            size, aside = round(part.bytes * share), part.name in ASIDE
            near = 0 if aside else round(min(size, device))
            there = self.run.rests == "host" and (limited or not aside)
            beside = round(min(size - near, host)) if there else 0
            by_place: dict[Place, int] = {"device": near, "host": beside, "disk": size - near - beside}
            device, host = device - near, host - beside
            parts += [Memory(part.name, held, place) for place, held in by_place.items() if held]
            stored = by_place["disk"] / size if size else not there
            moved += Work(carried=1 - near / max(size, 1), stored=stored) * (part.travels * share)
        work = stage.work and (stage.work + moved if self.run.on_device else stage.work)
        return replace(stage, parts=tuple(parts), work=work)

    def _in_hand(self, stage: Stage) -> int:
        outline, named = self.run.outline, {part.name for part in stage.parts}
        largest, held = max(layer.shape.numel() for layer in outline.layers), outline.dtype.itemsize
        if stage.phase == Phase.LOAD:
            return largest * (held + 4)
        if stage.phase == Phase.WRITE:  # a layer is masked, converted and copied; or an end runs in fp32
            return max(largest * (3 * held + 4), 4 * self.end) if self.run.on_device else largest * (held + 4)
        accepts = stage.phase == Phase.ACCEPT and self.run.dtype != torch.float32
        layer = self.module * (held + (1 if accepts else 4))  # as held, and masked, or the mask beside activations
        sums = 4 * stored_elements(max(outline.widths.values())) if Part.MOMENT_SUMS in named else 0
        freed = sum(part.bytes for part in stage.parts if part.name in ONE_BLOCK)
        beside = sum(part.bytes for part in stage.parts if part.name in PASSING) + freed
        moves = Part.GRADIENTS in named or stage.phase == Phase.PROPOSALS
        compared = max(self._compared(stage.phase, moves, *layer.shape) for layer in outline.layers) - beside
        if stage.phase not in BACKWARD and Part.FISHER not in named:
            return max(layer + sums, compared)
        changed = 1 + (outline.pattern.density if Part.ADAM in named else 0)  # the weight and moments, or a sum
        gradient = round(largest * (4 + changed * held))
        masked = 4 * (self.block - largest) if self.run.dtype == torch.float32 else 0  # others count as activations
        on_host = 1 + 2 * outline.pattern.density * held  # a mask, and what it keeps, twice
        step = round(largest * (STEP if self.run.on_device else on_host)) if Part.ADAM in named else 0
        return max(layer, masked + gradient + step + sums - freed, compared)

    def _compared(self, phase: Phase, moves: bool, rows: int, channels: int) -> int:
        """The bytes of a layer's weights, and of its moments, where it is scored or compared with the dense one.

        `moves` is whether orders change in the stage.
        """
        held = self.run.outline.dtype.itemsize
        if phase == Phase.CALIBRATE:
            return 4 * channels * (rows + channels) + held * stored_elements(channels)
        if moves:
            return (held + SCORED) * rows * channels
        return 4 * channels * (MEASURED * rows + channels) if phase == Phase.EVALUATE else 0
