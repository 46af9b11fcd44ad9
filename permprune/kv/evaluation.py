"""Perplexity of a language model with a pruned cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from permprune.errors import PermpruneError
from permprune.evaluation.perplexity import perplexity
from permprune.evaluation.result import Result, difference_error
from permprune.examples import Examples
from permprune.kv.cache import PrunedCache
from permprune.kv.config import KVConfig
from permprune.kv.files import CacheMeasurement, LayerChannels
from permprune.models.forward import cache_argument
from permprune.models.modality import EVALUATION_BATCH, positions_of

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


@dataclass(frozen=True)
class CacheMeter:
    """Measures the perplexity of a model on windows of text that are read through caches with the settings of `config`.

    Every token but the first of a window is predicted from the tokens before it, which are packed, except for the
    window and the sinks, as if they came one by one (`PrunedCache.exact_window`). `source` is the text's name. Raises
    `PermpruneError` if the windows are longer than the model's positions, and in the cases of `perplexity`.
    """

    model: PreTrainedModel
    config: KVConfig
    windows: Examples
    source: str | None

    def __post_init__(self) -> None:
        most, length = positions_of(self.model), self.windows["input_ids"].shape[1]
        if most is not None and length > most:
            raise PermpruneError(f"windows of {length} tokens exceed the model's {most} positions: shorten them")

    @cached_property
    def dense(self) -> Result:
        """The perplexity with whole states."""
        return perplexity(self.model, self.windows, EVALUATION_BATCH)

    def cached(self, channels: LayerChannels | None) -> CachedPerplexity:
        """Measure the perplexity with a cache that has these channels."""
        sizes = [(0, 0)]

        def logits_of(model: nn.Module, part: Examples) -> Tensor:
            cache = PrunedCache(self.model, self.config, channels, exact_window=True)
            logits = torch.cat(list(cached_logits(model, part["input_ids"], cache)), 1)
            sizes.append((cache.nbytes, cache.dense_nbytes))
            return logits

        result = perplexity(self.model, self.windows, 1, logits_of)
        return CachedPerplexity(result, *max(sizes))

    def compare(self, channels: LayerChannels) -> CacheMeasurement:
        """Measure the perplexity with whole states, and with a cache that has these channels."""
        cached = self.cached(channels)
        error = difference_error(cached.result, self.dense)
        return CacheMeasurement(
            data=self.source or "default data",
            length=self.windows["input_ids"].shape[1],
            count=self.dense.count,
            dense=self.dense.value,
            pruned=cached.result.value,
            dense_bytes=cached.dense_nbytes,
            pruned_bytes=cached.nbytes,
            error=None if error is None else error / self.dense.value,
        )
