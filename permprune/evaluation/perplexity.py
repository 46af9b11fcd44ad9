"""Perplexity of a language model on windows of text, and how many answers it gives word for word."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.evaluation.batched import per_example
from permprune.evaluation.result import EXACT_MATCH, PERPLEXITY, NotFinite, Result, ratio_error, share
from permprune.examples import IGNORED, Examples
from permprune.losses.cross_entropy import Logits, Projected, compute_logits, cross_entropy
from permprune.losses.targets import next_labels
from permprune.models.forward import is_encoder_decoder
from permprune.system.failures import failures_reported

LogitsOf = Callable[[nn.Module, Examples], Logits]
"""A function that computes a model's logits of a batch, (batch, length, vocabulary)."""


@failures_reported()
def perplexity(
    model: nn.Module, windows: Examples | Tensor, batch: int = 4, logits_of: LogitsOf | None = None
) -> Result:
    """Measure the perplexity: exp of the mean negative log-likelihood of tokens.

    `windows` are token ids, int64 (count, length) with length >= 2, or `Examples`. Each window is predicted
    independently of the others, from its second token on; of a model with a decoder the labels are predicted. All
    tokens have the same weight, padding is left out, and the loss is computed in fp32. The standard error is that over
    windows by the delta method, None for a single window. The model's training mode is left as it was. By default,
    `logits_of` runs the model without a cache. Raises `NotFinite` if a loss is not finite, and another `PermpruneError`
    if there is no token to predict.
    """
    nll, counts, _ = _predicted(model, Examples.of(windows), batch, logits_of)
    return _perplexity(nll, counts)


def answers(model: nn.Module, examples: Examples, batch: int = 4) -> list[Result]:
    """Measure the `perplexity` of answers, and the share of them that greedy decoding gives word for word.

    The answers are the labels of the examples. Raises as `perplexity` does.
    """
    nll, counts, right = _predicted(model, examples, batch, exact=True)
    given = int(counts.count_nonzero())
    return [_perplexity(nll, counts), share("answers", EXACT_MATCH, right=float(right[counts > 0].sum()), count=given)]


def _predicted(
    model: nn.Module, examples: Examples, batch: int, logits_of: LogitsOf | None = None, *, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The negative log-likelihood of each example, its number of tokens, and whether all are the most likely, if
    `exact`; fp64 (count,). Tokens that are `IGNORED` are left out."""

    def predicted(inputs: Examples) -> Tensor:
        labels = inputs["labels"] if is_encoder_decoder(model) else next_labels(inputs)
        logits = (logits_of or compute_logits)(model, inputs)[:, : labels.shape[1]]
        logits = logits.converted() if isinstance(logits, Projected) else logits
        nll, right = torch.zeros(2, len(labels), dtype=torch.float64)
        for window, tokens in enumerate(labels):
            counted, each = tokens != IGNORED, logits[window]
            if not counted.all():
                each, tokens = each[counted], tokens[counted]
            nll[window] = float(cross_entropy(each, tokens))
            if exact:
                whole = each.whole() if isinstance(each, Projected) else each
                right[window] = torch.equal(whole.argmax(1), tokens)
        return torch.stack([nll, labels.ne(IGNORED).sum(1).cpu(), right])

    nll, counts, right = per_example(model, examples, batch, predicted, rows=3, what="perplexity")
    if not counts.any():
        raise PermpruneError("the text has no tokens to predict: give longer windows, or labels that are not masked")
    return nll, counts, right


def _perplexity(nll: Tensor, counts: Tensor) -> Result:
    mean = nll.sum() / counts.sum()
    value = float(mean.exp())
    if not torch.isfinite(torch.tensor(value)):
        window = int((~nll.isfinite()).int().argmax())
        raise NotFinite(f"the loss on window {window} of the text is not finite: the weights or activations overflow")
    error = ratio_error(nll, counts)
    return Result(
        "language modelling",
        PERPLEXITY,
        value,
        count=int(counts.sum()),
        stderr=None if error is None else value * error,
        unit="tokens",
        terms=(nll, counts),
    )
