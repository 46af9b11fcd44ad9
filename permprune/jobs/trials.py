"""What is measured of a model, and the trial of one method after the other on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from permprune.checkpoints.io import read_model
from permprune.config import PruneConfig
from permprune.data.load import load_examples
from permprune.evaluation.agreement import ask
from permprune.evaluation.dispatch import evaluate_model, knows_right
from permprune.evaluation.lm_tasks import TaskList, task_figures
from permprune.evaluation.result import Result
from permprune.examples import Examples
from permprune.models.forward import decodes
from permprune.models.modality import BATCH_MULTIPLIER, EXAMPLES_PER_WINDOW, kind_of
from permprune.models.processors import Processor, tokenizer_of
from permprune.options import Count, require_fields
from permprune.permuters.base import Permuter, Run, Solution
from permprune.pipeline import prepare, update_weights
from permprune.system.memory import peak_memory_mb, reset_peak_memory
from permprune.system.progress import log

ANSWERED_ONCE = 32
"""Images or sentences to evaluate on for each window of text: they have one answer each, which says little."""

BATCH = 4
"""Windows of text to evaluate at a time, or as many examples as are asked for in their place."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Data to measure on: a source (None: the default data of the model's kind), and how much of it.

    `windows` are those of text, of `length` tokens; of images and sentences 32 examples stand for each. With `shared`
    it is the calibration's source as well. `metric` is one of `METRICS`, or accuracy; None: the one that suits. `tasks`
    are measured besides, where methods are compared. Raises `PermpruneError` for numbers out of range.
    """

    source: str | None = None
    windows: Count = 24
    length: Count = 512
    shared: bool = False
    metric: str | None = None
    tasks: TaskList | None = None

    def __post_init__(self) -> None:
        require_fields(self)

    @classmethod
    def beside(
        cls,
        config: PruneConfig,
        source: str | None,
        windows: int,
        metric: str | None = None,
        tasks: TaskList | None = None,
    ) -> tuple[PruneConfig, Evaluation]:
        """The config and the evaluation of a run, which share a source if they name the same one."""
        shared = source is not None and source == config.calibration
        evaluation = cls(source, windows, config.length, shared, metric, tasks)
        return dataclasses.replace(config, shared=shared), evaluation

    def examples(self, model: PreTrainedModel, processor: Processor | None) -> Examples:
        count = self.windows * (ANSWERED_ONCE if EXAMPLES_PER_WINDOW[kind_of(model)] > 1 else 1)
        return load_examples(self.source, model, processor, "evaluation", count, self.length, None, self.shared)


class Meter:
    """Measures a model on examples, by the metric that suits both; made while the model shows its dense weights.

    Where nobody knows what is right, the dense model is asked.
    """

    def __init__(self, model: PreTrainedModel, processor: Processor | None, evaluation: Evaluation) -> None:
        self.model, self.examples = model, evaluation.examples(model, processor)
        self.tokenizer = transcriber(model, processor)
        self.answers = None if knows_right(model, self.examples) else ask(model, self.examples)
        self.batch, self.metric = BATCH * BATCH_MULTIPLIER[kind_of(model)], evaluation.metric

    def __call__(self) -> Result:
        return evaluate_model(self.model, self.examples, self.tokenizer, self.answers, self.batch, self.metric)[0]


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a method found, what the model scores with it, and the peak memory of the process meanwhile.

    `peak_memory_mb` is in MiB, None where the system does not say; `tasks` are its scores on tasks, if any were
    asked for.
    """

    solution: Solution
    result: Result
    peak_memory_mb: float | None
    tasks: Sequence[Result] = ()

    def row(self, label: str) -> dict[str, Any]:
        cost = {"seconds": self.solution.seconds, "peak_memory_mb": self.peak_memory_mb}
        return {"method": label, self.result.metric: self.result.value, **cost, **task_figures(self.tasks)}


class Trials:
    """One model, read and calibrated, on which one method is tried after the other; `dense` is what it was before."""

    def __init__(self, name: str, config: PruneConfig, evaluation: Evaluation, partial: Path | None = None) -> None:
        self.tasks = evaluation.tasks.load() if evaluation.tasks else None
        reset_peak_memory()
        model, self.processor, _ = read_model(name, trust_remote_code=config.trust_remote_code)
        self.prepared = prepare(model, self.processor, config, partial=partial)
        with self.prepared.network.dense_weights():
            self.measure = Meter(model, self.processor, evaluation)

    @cached_property
    def overlap(self) -> float:
        """The share of the evaluation that is in the calibration as well."""
        return self.prepared.overlap(self.measure.examples)

    @cached_property
    def dense(self) -> Trial:
        with self.prepared.network.dense_weights():
            return self._trial(Solution({}, 0.0))

    def run(self, method: Permuter, run: Run | None = None) -> Trial:
        """Try a method, with the budget, seed and data of `run` if given."""
        reset_peak_memory()
        solution = method.solve(self.prepared.network, run or self.prepared.run)
        update_weights(self.prepared)
        trial = self._trial(solution)
        metric, value = trial.result.metric, trial.result.value
        log.info("%s: %s %.4g after %.0f s", method.name, metric, value, solution.seconds)
        return trial

    def _trial(self, solution: Solution) -> Trial:
        """Measure the weights that the model shows."""
        result, peak = self.measure(), peak_memory_mb()
        return Trial(solution, result, peak, self.tasks(self.prepared.model, self.processor) if self.tasks else ())


def transcriber(model: PreTrainedModel, processor: Processor | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer that reads what a model writes of speech; None for other models."""
    return tokenizer_of(processor) if kind_of(model) == "speech" and decodes(model) else None
