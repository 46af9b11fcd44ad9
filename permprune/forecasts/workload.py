"""The layers, the orders and the passes of the model, from which the costs of a run follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from permprune.forecasts.activations import Activations
from permprune.forecasts.resources import Work
from permprune.pruning.problem import Outline


@dataclass(frozen=True)
class Workload:
    """The layers and orders of a run, and the cost of passes of its model.

    `threads` problems are solved at a time, one on each thread. A pass forward over an example is the work `forward`. A
    batch has `batch` examples, and activations have type `dtype`. `gradient` are its activations with gradients of the
    weights, and `loss` those of a batch of a pass without gradients, which may be larger. `held_out` is the number of
    examples of the accept test, and `examples_per_window` as in `Run`. `labelled` is whether each position predicts one
    of the labels, as in text, and `one_label` whether an example has only one. `on_device` is whether it runs on a
    device with memory of its own.
    """

    outline: Outline
    threads: int
    forward: Work
    batch: int
    gradient: Activations
    loss: Activations
    dtype: torch.dtype
    held_out: int
    examples_per_window: int
    recompute: bool
    labelled: bool = True
    one_label: bool = False
    on_device: bool = False

    @property
    def gradient_bytes(self) -> int:
        """The bytes of the gradients of all weights (see `pruning.gradients.Gradients`)."""
        return min(self.dtype.itemsize, self.outline.dtype.itemsize) * self.outline.weights

    def teacher_outputs(self, examples: int) -> int:
        """The bytes of the dense model's block outputs for some examples."""
        return examples * self.gradient.outputs // self.batch

    def loss_work(self, examples: int) -> Work:
        """The work of a loss on some examples."""
        return self.forward * examples

    def gradient_work(self, examples: int) -> Work:
        """The work of a gradient: forward, backward to the inputs and to the weights, and again with `recompute`.

        With one label per example the covariance of rows follows from pairs of positions (`row_covariance`).
        """
        passes = self.loss_work(examples * (4 if self.recompute else 3))
        return passes + self.position_work(examples) + self.correlated(lambda _, rows: self.positions * rows) * examples

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
