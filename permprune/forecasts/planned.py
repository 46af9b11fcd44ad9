"""The time of a run whose model and data are known."""

from __future__ import annotations

from statistics import fmean

from transformers import PreTrainedModel

from permprune.checkpoints.origin import origin_of
from permprune.examples import Examples, batches
from permprune.forecasts.machine import this_machine
from permprune.forecasts.passes import Shapes, example_pass
from permprune.forecasts.run import Forecast, Subject, forecast_held
from permprune.models.generation import needs_decoder_inputs
from permprune.models.modality import BATCH_MULTIPLIER, kind_of
from permprune.plan import Plan
from permprune.system import distributed

SEEN = 8
"""The number of batches whose lengths stand for those of all."""


def forecast_plan(model: PreTrainedModel, plan: Plan, windows: int) -> Forecast:
    """Forecast the time of a run with a plan, which holds the whole model; its memory is not forecast.

    `windows` is the number of windows of the evaluation. The lengths are those of the examples.
    """
    origin, processes = origin_of(model), distributed.world()
    examples = sum(len(part) for part in (plan.measured, plan.run.held_out, plan.run.train))
    subject = Subject(
        origin.name,
        model,
        plan.outline,
        this_machine(),
        origin.dtype,
        windows,
        processes,
        examples=examples,
        transcribed=examples if needs_decoder_inputs(model, plan.measured) else 0,
    )
    shown = _shown(plan.run.train, plan.config.batch * BATCH_MULTIPLIER[kind_of(model)])
    return forecast_held(subject, plan.config, example=example_pass(model, plan.config, shown=shown))


def _shown(examples: Examples, batch: int) -> Shapes:
    """The shapes of an example as it is shown to a model, of texts in a batch with the mean length of batches."""
    shapes: dict[str, tuple[int, ...]] = {}
    seen = batches(examples[: SEEN * batch], batch)
    for name in examples:
        shape = [(1, *part[name].shape[1:]) for part in seen]
        shapes[name] = (1, round(fmean(length for _, length in shape))) if len(shape[0]) == 2 else shape[0]
    return shapes
