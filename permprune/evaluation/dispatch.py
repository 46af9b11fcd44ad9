"""The choice of the metric for a model and its examples."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from permprune.errors import PermpruneError
from permprune.evaluation.agreement import DenseOutputs, agreement, pair_similarity
from permprune.evaluation.metrics import accuracy, measure_labels
from permprune.evaluation.perplexity import answers, perplexity
from permprune.evaluation.result import Result
from permprune.evaluation.speech import word_error_rate
from permprune.examples import Examples
from permprune.models.forward import is_causal_lm, is_ctc, writes_text
from permprune.models.modality import pooling_of
from permprune.options import Count, require
from permprune.system.failures import failures_reported


@failures_reported()
def evaluate_model(
    model: nn.Module,
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dense: nn.Module | DenseOutputs | None = None,
    batch: int = 4,
    metric: str | None = None,
) -> list[Result]:
    """Measure a model on examples; the most important result comes first.

    With `dense`, the agreement with that model is measured, of a sentence encoder beside what follows from labels.
    Otherwise the metric depends on the model and the labels: word error rate for speech, whose labels the `tokenizer`
    decodes; perplexity for language models, and exact match of answers; accuracy for classes; correlation for scores,
    with which a sentence encoder's similarities of pairs are compared; or `metric`, if it is given.
    The model runs on `batch` examples at a time. Raises `PermpruneError` if nothing can be measured, or if the metric
    does not fit.
    """
    require("batch", batch, Count)
    labels, pooling = examples.get("labels"), pooling_of(model)  # type: ignore[arg-type]
    scores = labels is not None and labels.is_floating_point()
    if metric is not None and labels is None:
        raise PermpruneError(f'the metric "{metric}" needs labels: give examples that have them')
    if pooling and labels is not None:
        results = pair_similarity(model, examples, pooling, metric, batch)
        return results if dense is None else results + agreement(model, examples, dense, batch=batch)
    if dense is not None:
        if metric is not None or scores:
            raise PermpruneError(
                "the dense model is compared by agreement alone, not by scores or a metric of labels: leave one out"
            )
        return agreement(model, examples, dense, batch=batch)
    if pooling:
        raise PermpruneError(
            "the texts have no scores: give pairs of texts with a column score, or the dense model to compare with"
        )
    if labels is None:
        if is_causal_lm(model) and "input_ids" in examples:
            return [perplexity(model, examples, batch)]
        raise PermpruneError("there are no labels: give examples with labels, or a dense model to compare with")
    of_text = labels.dim() == 2 and (writes_text(model) or is_causal_lm(model))
    if scores or metric not in (None, "accuracy") or (of_text and metric is not None):
        return measure_labels(model, examples, metric, batch=batch)
    if not of_text:
        return [accuracy(model, examples, batch)]
    if not writes_text(model):
        return answers(model, examples, batch)
    if tokenizer is not None and {"input_features", "input_values"}.intersection(examples):
        return [word_error_rate(model, examples, tokenizer, batch=batch)]
    if is_ctc(model):
        raise PermpruneError("the word error rate needs the tokenizer of the transcripts: give it with the model")
    return [perplexity(model, examples, batch)]


def has_targets(model: nn.Module, examples: Examples) -> bool:
    """Whether the examples have targets: labels, or the next tokens of text for a causal language model."""
    return "labels" in examples or (is_causal_lm(model) and "input_ids" in examples)
