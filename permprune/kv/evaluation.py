"""Perplexity of a language model with a pruned cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from permprune.errors import PermpruneError
from permprune.evaluation.perplexity import perplexity
from permprune.evaluation.result import Result
from permprune.examples import Examples
from permprune.kv.cache import PrunedCache
from permprune.models.forward import cache_argument
from permprune.models.positions import positions_of

CHUNK = 512
"""Number of tokens in a forward pass."""


@dataclass(frozen=True)
class CachedPerplexity:
    """The perplexity with a cache, and the bytes of the largest cache, pruned and as `DynamicCache` would store it."""

    result: Result
    nbytes: int
    dense_nbytes: int


def cached_logits(model: nn.Module, tokens: Tensor, cache: Cache) -> Iterator[Tensor]:
    """Yield the logits of tokens, (batch, length), that are read through a cache, some hundred tokens at a time."""
    for part in tokens.split(CHUNK, 1):
        yield model(input_ids=part, **cache_argument(model, cache)).logits


def cached_perplexity(
    model: PreTrainedModel, windows: Examples, cache: Callable[[], PrunedCache], batch: int = 4
) -> CachedPerplexity:
    """Measure the perplexity on windows of text that are read through a cache; `cache` makes an empty one.

    Every token but the first of a window is predicted from the tokens before it. With the `exact_window` of a
    `PrunedCache` those are pruned, except for the window and the sinks, as if the tokens came one by one. Raises
    `PermpruneError` if the windows are longer than the model's positions, and in the cases of `perplexity`.
    """
    most, length = positions_of(model), windows["input_ids"].shape[1]
    if most is not None and length > most:
        raise PermpruneError(f"windows of {length} tokens are longer than the model's {most} positions: shorten them")
    sizes = [(0, 0)]

    def logits_of(model: nn.Module, part: Examples) -> Tensor:
        pruned = cache()
        logits = torch.cat(list(cached_logits(model, part["input_ids"], pruned)), 1)
        sizes.append((pruned.nbytes, pruned.dense_nbytes))
        return logits

    result = perplexity(model, windows, batch, logits_of)
    return CachedPerplexity(result, *max(sizes))
