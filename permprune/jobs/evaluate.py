"""The job of `permprune evaluate`: evaluate a model on data."""

from __future__ import annotations

import reprlib

from permprune.checkpoints.source import ModelSource, open_model
from permprune.engine.measuring import Evaluation, transcriber
from permprune.errors import PermpruneError
from permprune.evaluation.dispatch import evaluate_model
from permprune.evaluation.result import Result
from permprune.models.modality import evaluation_batch
from permprune.models.processors import Processor
from permprune.system.failures import failures_reported
from permprune.system.progress import MEASURE, READ, stage, stages


def evaluate(
    model: ModelSource,
    evaluation: Evaluation | None = None,
    processor: Processor | None = None,
    *,
    trust_remote_code: bool = False,
) -> Result:
    """Evaluate a model on data and return the metric: for example perplexity, accuracy or word error rate.

    `model` is a name, a folder, or a model in memory with its `processor`. `trust_remote_code` is as in `read_model`.
    Raises `PermpruneError`, for example if the data have no labels. Use `evaluate_model` for examples in memory.
    """
    return evaluate_all(model, evaluation, processor, trust_remote_code=trust_remote_code)[0]


@failures_reported()
@stages(READ, MEASURE)
def evaluate_all(
    model: ModelSource,
    evaluation: Evaluation | None = None,
    processor: Processor | None = None,
    *,
    dense: ModelSource | None = None,
    task: str | None = None,
    trust_remote_code: bool = False,
) -> list[Result]:
    """Evaluate a model as `evaluate` does, and return all metrics, the most important first.

    With `dense` these are the agreement with that model, and of a sentence encoder those of labels as well. `task` is
    as in `read_model`.
    """
    evaluation = Evaluation() if evaluation is None else evaluation
    if not isinstance(evaluation, Evaluation):
        raise PermpruneError(
            f"the evaluation is {reprlib.repr(evaluation)}: give an Evaluation, such as Evaluation(data)"
        )
    opened = open_model(model, processor, task=task, trust_remote_code=trust_remote_code)
    examples = evaluation.examples(opened.model, opened.processor)
    stage(MEASURE)
    tokenizer, batch = transcriber(opened.model, opened.processor), evaluation_batch(opened.model)
    other = None if dense is None else open_model(dense, task=task, trust_remote_code=trust_remote_code).model
    metric = evaluation.metric
    return evaluate_model(opened.model, examples, tokenizer, dense=other, batch=batch, metric=metric)
