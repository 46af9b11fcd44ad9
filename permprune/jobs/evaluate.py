"""Evaluate a model by name or folder."""

from __future__ import annotations

from permprune.checkpoints.io import read_model
from permprune.evaluation.dispatch import evaluate_model
from permprune.evaluation.result import Result
from permprune.jobs.trials import BATCH, Evaluation, transcriber
from permprune.models.modality import BATCH_MULTIPLIER, kind_of
from permprune.system.out_of_memory import memory_reported


@memory_reported()
def evaluate(name: str, evaluation: Evaluation, *, trust_remote_code: bool = False) -> Result:
    """What a model, by name or folder, scores: perplexity, accuracy or word error rate.

    `trust_remote_code` is as that of `read_model`. Raises `PermpruneError` for examples that do not say what is right.
    """
    model, processor, _ = read_model(name, trust_remote_code=trust_remote_code)
    examples, tokenizer = evaluation.examples(model, processor), transcriber(model, processor)
    return evaluate_model(
        model, examples, tokenizer, None, BATCH * BATCH_MULTIPLIER[kind_of(model)], evaluation.metric
    )[0]
