"""One run, written once: measure the dense model and the natural order, search, update, measure, finish."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from transformers import PreTrainedModel

from permprune.checkpoints.record import PACKED, SIDES, Measured, Other, Record, Showcase, SizeAndSpeed
from permprune.data.overlap import warn_of_overlap
from permprune.engine.held import Held
from permprune.engine.measuring import DENSE, Evaluation, Measurement, Meter
from permprune.engine.pruned import Pruned
from permprune.evaluation.result import NotFinite, gap_closed
from permprune.evaluation.size import weight_bytes
from permprune.inference.pack import packed_bytes
from permprune.permuters.base import Callback, Permuter, Run, Solution
from permprune.recipe import Recipe
from permprune.showcase.shown import Shown
from permprune.system import progress
from permprune.system.memory import peak_memory_mb, release_freed_memory, reset_peak_memory
from permprune.system.progress import log, stage


class Session:
    """Runs of one or several methods on a calibrated model, measured beside the dense model.

    `open_weights` reads and calibrates the model; the evaluation's data are loaded before anything is searched. If a
    loss limits the patterns of a mix, half of the data are for `choosing` them. A context manager: it restores the
    dense weights at the end, unless the model was pruned. `answers` are those of the models of `SIDES` to the examples
    that are shown, after `beside`.
    """

    def __init__(self, open_weights: Callable[[], Held], evaluation: Evaluation) -> None:
        self.evaluation, self.pruned = evaluation, False
        self.answers: dict[str, list[str]] = {}
        reset_peak_memory()
        stage(progress.READ)
        self.weights = open_weights()
        try:
            with self.weights.dense():
                model, processor = self.weights.model, self.weights.processor
                if self.weights.plan.config.max_loss is None:
                    self.choosing, self.measure = None, Meter(model, processor, evaluation)
                else:
                    self.choosing, self.measure = Meter.halves(model, processor, evaluation)
                examples, reason = self.measure.examples, self.weights.unanswering
                self.shown = Shown(model, processor, examples, evaluation.shown, reason=reason)
        except BaseException:
            self.weights.restore()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.pruned:
            self.weights.restore()

    @cached_property
    def overlap(self) -> float:
        """The share of the evaluation data that the calibration data contain; logs a warning if it is large."""
        share = self.weights.plan.overlap(self.measure.examples)
        warn_of_overlap(share)
        return share

    @cached_property
    def dense(self) -> Measurement:
        """The measurement of the dense model."""
        stage(progress.DENSE)
        with self.weights.dense():
            return self._measurement(DENSE, 0.0)

    def recipe(self, order: Permuter | None = None) -> Recipe:
        """The recipe of the config, with another order if one is given."""
        recipe = self.weights.plan.config.recipe
        return recipe if order is None else dataclasses.replace(recipe, order=order)

    def attempt(self, method: Permuter, label: str, run: Run | None = None) -> tuple[Solution, Measurement]:
        """Run the recipe with another order, and measure the pruned model; `run` replaces that of the plan."""
        reset_peak_memory()
        solution = self.weights.run(self.recipe(method), run or self.weights.plan.run)
        stage(progress.MEASURE)
        measurement = self._measurement(label, solution.seconds)
        result = measurement.result
        log.info("%s: %s %.4g after %.0f s", method.name, result.metric, result.value, solution.seconds)
        return solution, measurement

    def prune(
        self,
        method: Permuter | None = None,
        *,
        callbacks: tuple[Callback, ...] = (),
        tried: Mapping[str, Measurement] | None = None,
    ) -> tuple[Pruned, Record]:
        """Prune by the recipe, and put the model in stored order; nothing can be tried afterwards.

        A `method` replaces its order. `callbacks` are called after the rounds of the search. `tried` are the
        measurements of the natural order and of the method by name, if they were tried. The record has what was
        measured.
        """
        weights, known, recipe = self.weights, tried or {}, self.recipe(method)
        dense, overlap = self.dense.result, self.overlap
        natural = weights.natural()
        none = (not recipe.changes and known.get("none")) or self._measurement("none", 0.0)
        solution = weights.run(recipe, dataclasses.replace(weights.plan.run, callbacks=callbacks))
        stage(progress.MEASURE)
        label = recipe.order.name
        unchanged = {} if recipe.changes else {"none": none}
        measured = {**known, **unchanged}.get(label) or self._measurement(label, solution.seconds)
        self.pruned = True
        stage(progress.WRITE)
        pruned = weights.finish(solution, natural)
        value, value_none = measured.result.value, none.result.value
        record = dataclasses.replace(
            pruned.record(),
            measured=Measured(
                data=self.evaluation.source or "default data",
                metric=dense.metric.name,
                dense=dense.value,
                none=value_none,
                pruned=value,
                count=dense.count,
                unit=dense.unit,
                overlap=overlap,
                others=_others(self.dense, none, measured),
            ),
            gap_closed=gap_closed(value, dense.value, value_none, metric=dense.metric),
            seconds={"calibrate": weights.seconds, "search": solution.seconds},
            peak_memory_mb=measured.peak_memory_mb,
            showcase=self.beside(none, measured, pruned),
        )
        return pruned, record

    def with_packed(self, record: Record, model: PreTrainedModel) -> Record:
        """Return the record of a model that was pruned and packed, with the measurement of its packed form."""
        assert record.measured is not None
        measurement, known = self._measurement("packed", 0.0, model), record.measured
        self.answers = {**self.answers, "pruned": measurement.answers}
        result, packed = measurement.result, record.extra[PACKED]["dtype"]
        values = {one.metric.name: one.value for one in measurement.others if math.isfinite(one.value)}
        others = [dataclasses.replace(one, pruned=values[one.metric]) for one in known.others if one.metric in values]
        log.info("packed as %s: %s %.4g, before %.4g", packed, known.metric, result.value, known.pruned)
        return dataclasses.replace(
            record,
            measured=dataclasses.replace(known, pruned=result.value, others=others, packed=packed),
            gap_closed=gap_closed(result.value, known.dense, known.none, metric=result.metric),
            showcase=record.showcase and self.shown.beside(self.answers, record.showcase.sides),
        )

    def beside(self, none: Measurement, measured: Measurement, pruned: Pruned | None = None) -> Showcase:
        """Return the dense model, the one pruned in natural order and another side by side.

        Without the `pruned` model there are no bytes of packed weights.
        """
        model = self.weights.model if pruned is None else pruned.model
        stored = weight_bytes(model, self.weights.stored)
        sizes: list[int | None] = [None, None, None]
        if pruned is not None:
            patterns = {layer.name: layer.pattern for layer in pruned.layers}
            packed = [packed_bytes(model, patterns, gathers) for gathers in ((), pruned.gathers)]
            sizes = [weight_bytes(model, torch.bfloat16), *packed]
        answers = [self.dense.answers, none.answers, measured.answers]
        self.answers = dict(zip(SIDES, answers, strict=True))
        sides = [SizeAndSpeed(stored, size) for size in sizes]
        return self.shown.beside(self.answers, dict(zip(SIDES, sides, strict=True)))

    def _measurement(self, label: str, seconds: float, model: PreTrainedModel | None = None) -> Measurement:
        """Measure the model with its current weights, or another form of it.

        A perplexity of a pruned model that is not finite is infinity.
        """
        release_freed_memory()  # of what came before, which needed other sizes
        try:
            result, *others = self.measure(model)
        except NotFinite as error:
            if label == DENSE:
                raise
            log.warning("%s: %s", label, error)
            result, others = dataclasses.replace(self.dense.result, value=math.inf, stderr=None), []
        peak = peak_memory_mb()
        return Measurement(
            method=label,
            result=result,
            seconds=seconds,
            peak_memory_mb=peak,
            others=others,
            answers=self.shown.answers(model),
        )


def _others(*measurements: Measurement) -> list[Other]:
    """The other metrics of the dense model, of the natural order and of the pruned model, as far as all are finite."""
    values = [{result.metric.name: result.value for result in one.others} for one in measurements]
    names = [name for name in values[0] if all(math.isfinite(held.get(name, math.inf)) for held in values)]
    return [Other(name, *(held[name] for held in values)) for name in names]
