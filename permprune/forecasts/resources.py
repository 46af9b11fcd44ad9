"""The memory and the work of a run, by stage and part, and the layers, orders and passes from which they follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from permprune.models.modality import LIGHT

if TYPE_CHECKING:
    import torch

    from permprune.forecasts.activations import Activations
    from permprune.pruning.problem import Outline
    from permprune.system.shelf import Place


class Part(StrEnum):
    """What a stage holds, in the words that are shown, as far as a run that offloads treats it in a way of its own."""

    WEIGHTS = "weights"
    SECOND_MOMENTS = "second moments"
    MOMENT_SUMS = "sums of moments"
    BLOCK_SUMS = "sums of a block"
    BLOCK_OUTPUTS = "outputs"
    FISHER = "Fisher information"
    ACTIVATIONS = "activations"
    LOGITS = "logits"
    GRADIENTS = "gradients"
    GRADIENT_SUMS = "sums of gradients"
    SLOPES = "slopes of the largest problem"
    MODEL = "largest problem's model"
    IN_TRAINING = "weights in training"
    ADAM = "Adam's moments"
    TRAINED = "trained weights"
    BEST_TRAINED = "best trained weights"
    UPDATED = "updated weights"


@dataclass(frozen=True)
class Memory:
    """Bytes of memory that a stage holds, by name and place.

    If they rest elsewhere in a run that offloads, `travels` bytes are read from there or written there.
    """

    name: str
    bytes: int
    place: Place = "device"
    travels: float = 0.0


@dataclass(frozen=True)
class Work:
    """The operations of a stage.

    Attributes:
        products: Floating-point operations of matrix products in the type of the activations.
        products_fp32: Floating-point operations of matrix products in fp32.
        comparisons: Element operations of `add_placement_cost`, each a comparison, a difference and a sum.
        largest: The share of `comparisons` that belong to the largest problem, which one thread solves.
        moved: Bytes that operations on single elements read from memory or write to it.
        stored: Bytes read from disk or written to it.
        carried: Bytes that travel between the memory of the host and that of a device.
    """

    products: float = 0.0
    products_fp32: float = 0.0
    comparisons: float = 0.0
    moved: float = 0.0
    stored: float = 0.0
    carried: float = 0.0
    largest: float = 0.0

    def __add__(self, other: Work) -> Work:
        """The work of both; `largest` is 0."""
        return Work(**{name: amount + vars(other)[name] for name, amount in vars(self).items()} | {"largest": 0.0})

    def __mul__(self, factor: float) -> Work:
        return Work(**{name: amount * factor for name, amount in vars(self).items()} | {"largest": self.largest})


class Phase(StrEnum):
    """What a stage of a run does, in the words that are shown."""

    LOAD = "load"
    TRANSCRIBE = "transcribe"
    CALIBRATE = "calibrate"
    PATTERNS = "patterns"  # of a mix are chosen
    SEARCH = ""  # in one stage: it is named after the method alone
    SCORES = "scores"
    GRADIENTS = "gradients"
    RELAXATION = "relaxation"
    PROPOSALS = "proposals"
    ACCEPT = "accept"
    BLOCKS = "blocks"
    TRAINING = "training"
    UPDATE = "update"
    OTHER_SHARES = "other shares of the weights"  # are tried for a limit of the loss
    EVALUATE = "evaluate"
    WRITE = "write"
    PACK = "pack"


@dataclass(frozen=True)
class Stage:
    """A stage of a run: the parts that it holds at its peak, and its work; None if the work is not known.

    Those of a search or an update have the name of the `method`. `limited` is whether the time limit of a run covers
    it, and `last` whether it may take all that is left of it.
    """

    phase: Phase
    parts: tuple[Memory, ...]
    work: Work | None = field(default_factory=Work)
    method: str = ""
    limited: bool = False
    last: bool = False

    @property
    def name(self) -> str:
        """The method and the phase, in the words that are shown."""
        return ": ".join(filter(None, (self.method, self.phase)))

    def bytes(self, place: Place | None = None) -> int:
        """The bytes of its parts at one place, or in memory."""
        return sum(part.bytes for part in self.parts if part.place == place or (not place and part.place != "disk"))

    def holds(self, name: str) -> bool:
        """Whether it has a part of this name."""
        return any(part.name == name for part in self.parts)

    def beside(self, others: Iterable[Memory]) -> Stage:
        """The stage with other parts that are held all the time."""
        return replace(self, parts=(*others, *self.parts))


@dataclass(frozen=True)
class Workload:
    """The layers and orders of a run, and the cost of passes of its model.

    `threads` problems are solved at a time, one on each thread. A pass forward over an example is the work `forward`. A
    batch has `batch` examples, and activations have type `dtype`. `gradient` are its activations with gradients of the
    weights, and `loss` those of a batch of a pass without gradients, which may be larger. `held_out` and `measured` are
    the numbers of examples of the accept test and of an update, and `examples_per_window` is as in `Run`. `labelled` is
    whether each position predicts one of the labels, as in text, and `one_label` whether an example has only one.
    `on_device` is whether it runs on a device with memory of its own, and `rests` where weights and sums are while they
    are not used.
    """

    outline: Outline
    threads: int
    forward: Work
    batch: int
    gradient: Activations
    loss: Activations
    dtype: torch.dtype
    held_out: int
    measured: int
    examples_per_window: int
    recompute: bool
    labelled: bool = True
    one_label: bool = False
    on_device: bool = False
    rests: Place = "device"

    @property
    def gradient_bytes(self) -> int:
        """The bytes of the gradients of all weights (see `pruning.gradients.Gradients`)."""
        return min(self.dtype.itemsize, self.outline.dtype.itemsize) * self.outline.weights

    @property
    def packed(self) -> Memory:
        """The weights that a pass without gradients packs for several batches, on a CPU where all weights are held."""
        from permprune.kernels.product.masked import ROOM  # with it torch, which checks of the command line do without

        held = 0 if self.on_device or self.rests != "device" else self.outline.weights
        each = 4.125 if self.dtype.itemsize == 4 else 1.125  # see `MaskedWeight.packed_bytes`
        return Memory("packed weights", min(int(each * held), ROOM))

    def carrying(self, size: float) -> Work:
        """The work of moving bytes between a device and where they rest; on a CPU files are in the system's memory."""
        if self.rests == "device" or not self.on_device:
            return Work()
        return Work(carried=size, stored=size if self.rests == "disk" else 0.0)

    def block_outputs(self, examples: int) -> int:
        """The bytes of what a block computes of so many examples, the mean of all blocks."""
        return self.loss.outputs * examples // (LIGHT * self.batch * len(self.outline.blocks))

    def pass_work(self, examples: float, batch: int, passes: float = 1.0) -> Work:
        """The work of so many passes forward over some examples, each batch of which reads all weights."""
        read = math.ceil(examples / batch) * self.outline.dtype.itemsize * self.outline.weights
        return (self.forward * examples + self.carrying(read)) * passes

    def loss_work(self, examples: float) -> Work:
        """The work of a loss on some examples, in the batches of a pass without gradients."""
        return self.pass_work(examples, LIGHT * self.batch)

    def summed(self, name: str, examples: float, times: float = 1.0) -> Memory:
        """The sums of gradients, which are read and written with each batch of so many examples, so many times."""
        size = self.gradient_bytes
        return Memory(name, size, travels=2.0 * size * math.ceil(examples / self.batch) * times)

    def gradient_work(self, examples: int) -> Work:
        """The work of a gradient of the search: forward, backward to the inputs and to the weights.

        With one label per example the covariance of rows follows from pairs of positions (`row_covariance`): what is of
        rows alone is multiplied in the type of the activations.
        """
        work = self.pass_work(examples, self.batch, 2 if self.recompute else 1) + self.forward * (2 * examples)
        rows = self.correlated(lambda _, rows: self.positions * rows).products_fp32
        return work + self.position_work(examples) + Work(products=rows) * examples

    def position_work(self, examples: int) -> Work:
        """The work of the products of all positions of an example with each other, where it has one label."""
        return self.correlated(lambda channels, rows: self.positions**2 * (channels + rows) / rows) * examples

    @property
    def positions(self) -> float:
        """The positions of an example."""
        return self.forward.products / (2 * self.outline.weights)

    def correlated(self, each: Callable[[int, int], float]) -> Work:
        """The work of products of the rows of all layers with `each(channels, rows)` others, if rows are correlated."""
        if not self.one_label:
            return Work()
        shapes = [(layer.weight.shape[1], self.outline.rows[layer.name]) for layer in self.outline.layers]
        return Work(products_fp32=sum(2 * rows * each(channels, rows) for channels, rows in shapes))

    def each_problem(self, work: Callable[[int, int, int], Work]) -> Work:
        """Return the sum of `work(channels, rows, m)` over all problems, of which one thread does the largest."""
        outline = self.outline
        each = [work(problem.size, outline.rows_of(problem), outline.pattern.m) for problem in outline.problems]
        total, compared = sum(each, Work()), [one.comparisons for one in each]
        return replace(total, largest=max(compared, default=0.0) / max(sum(compared), 1.0))
