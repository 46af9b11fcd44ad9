"""Evaluation data, and measurements of models on them."""

from __future__ import annotations

import dataclasses
from typing import Any

from permprune.config import PruneConfig
from permprune.errors import PermpruneError
from permprune.evaluation.result import Result, require_label_metric
from permprune.models.modality import EVALUATION_WINDOWS, evaluation_batch, evaluation_count, kind_of
from permprune.options import Count, Length, Natural, require_fields
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from permprune.data.load import load_examples
    from permprune.evaluation.agreement import dense_outputs
    from permprune.evaluation.dispatch import evaluate_model, has_targets
    from permprune.examples import Examples
    from permprune.models.forward import writes_text
    from permprune.models.processors import Processor, tokenizer_of

DENSE = "dense"
"""The label of the model before pruning."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The data and the metric of an evaluation. Raises `PermpruneError` for numbers out of range."""

    source: str | None = None
    """The data to evaluate on: text, answers, sentences, images or speech in a file or folder, or a data set id; by
    default the text or the images of the zoo."""

    windows: Count = EVALUATION_WINDOWS
    """Windows of text to evaluate on; 32 sentences or images count as one."""

    length: Length = 512
    """Tokens in a window of text."""

    _: dataclasses.KW_ONLY

    shared: bool = False
    """Whether calibration uses the same source: each then gets half of its images, speech or sentences."""

    metric: str | None = None
    """The metric for labels: accuracy, matthews, f1, pearson or spearman; by default accuracy for classes, pearson for
    scores."""

    shown: Natural = 3
    """Examples for which the answers of the dense and the pruned models are shown, 0 for none; four times as many if
    the answers are classes."""

    def __post_init__(self) -> None:
        require_fields(self)
        require_label_metric(self.metric)

    def beside(self, config: PruneConfig) -> tuple[PruneConfig, Evaluation]:
        """Return the config and the evaluation of a run, with windows of the config's length.

        `shared` is set in both if they name the same source.
        """
        shared = self.source is not None and config.reads(self.source)
        return config.replace(shared=shared), dataclasses.replace(self, length=config.length, shared=shared)

    def examples(self, model: PreTrainedModel, processor: Processor | None) -> Examples:
        """Load the examples to measure a model on. Raises `PermpruneError` if they cannot be read."""
        count = evaluation_count(model, self.windows)
        return load_examples(
            self.source, model, processor, part="evaluation", count=count, length=self.length, shared=self.shared
        )


def require_data(config: PruneConfig, evaluation: Evaluation) -> None:
    """Raise `PermpruneError` if a limit of the loss is given without the data that it is measured on."""
    if config.max_loss is not None and evaluation.source is None:
        raise PermpruneError("--max-loss is measured on data of yours: give them with --data")


class Meter:
    """Measures a model on the examples of an evaluation, by the metric that fits both.

    `examples` replace those of the evaluation. It has to be created while the model has its dense weights: without
    labels, the metric is the agreement with the dense model's outputs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Processor | None,
        evaluation: Evaluation,
        examples: Examples | None = None,
    ) -> None:
        self.model, self.examples = model, evaluation.examples(model, processor) if examples is None else examples
        self.tokenizer = transcriber(model, processor)
        self.dense = None if has_targets(model, self.examples) else dense_outputs(model, self.examples)
        self.batch, self.metric = evaluation_batch(model), evaluation.metric

    @classmethod
    def halves(cls, model: PreTrainedModel, processor: Processor | None, evaluation: Evaluation) -> tuple[Meter, Meter]:
        """Return two meters, each with its own half of twice as many examples. Raises `PermpruneError`."""
        examples = dataclasses.replace(evaluation, windows=2 * evaluation.windows).examples(model, processor)
        if (half := len(examples) // 2) < 1:
            raise PermpruneError("there is one example to evaluate on: to choose and to confirm, give two or more")
        first, second = (cls(model, processor, evaluation, part) for part in (examples[:half], examples[half:]))
        return first, second

    def __call__(self, model: PreTrainedModel | None = None) -> list[Result]:
        """Measure the model, or another one, as the same packed; the result that counts comes first."""
        dense, batch, metric = self.dense, self.batch, self.metric
        model = self.model if model is None else model
        return evaluate_model(model, self.examples, self.tokenizer, dense=dense, batch=batch, metric=metric)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """The result of the model with a method, or without pruning ("dense"), and the cost of the method.

    `seconds` is the time of the search including its start. `peak_memory_mb` is the peak memory of the process in MiB,
    None if the system does not report it. `others` are other metrics of the same predictions, and `answers` the model's
    answers to the examples that are shown.
    """

    method: str
    result: Result
    seconds: float
    peak_memory_mb: float | None
    others: list[Result] = dataclasses.field(default_factory=list)
    answers: list[str] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the measurement as JSON values; the key of the value is the name of the metric."""
        cost = {"seconds": self.seconds, "peak_memory_mb": self.peak_memory_mb}
        values = {result.metric.name: result.value for result in (self.result, *self.others)}
        return {"method": self.method, **values, **cost}


def transcriber(model: PreTrainedModel, processor: Processor | None) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that decodes the transcripts of a speech-to-text model; None for other models."""
    return tokenizer_of(processor) if kind_of(model) == "speech" and writes_text(model) else None
