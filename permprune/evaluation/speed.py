"""Measure how fast a causal language model reads a prompt and generates tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from permprune.checkpoints.benchmark import Speed
from permprune.errors import PermpruneError
from permprune.models.forward import cache_argument, evaluating, is_causal_lm
from permprune.models.signature import argument_names
from permprune.system.device import compute_device

STEPS = 16
"""Default number of tokens that are generated to measure the time per token."""


@torch.inference_mode()
def measure_speed(
    model: PreTrainedModel,
    *,
    batch: int,
    context: int,
    steps: int = STEPS,
    seed: int = 0,
    cache: Callable[[], Cache] | None = None,
) -> Speed:
    """Measure the time to read a random prompt of `context` tokens and then to generate `steps` tokens greedily.

    `batch` sequences are processed in parallel, once. `seed` is the seed of the prompt. `cache` makes an empty
    key/value cache, by default Transformers' `DynamicCache`. Raises `PermpruneError` if the model is not a causal
    language model.
    """
    if not is_causal_lm(model):
        raise PermpruneError("speed is only measured for causal language models: give one")
    generator, device = torch.Generator().manual_seed(seed), compute_device(model)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (batch, context), generator=generator).to(device)
    held = DynamicCache(config=model.config) if cache is None else cache()
    with evaluating(model):
        began = _now(device)
        token = _next_token(model, prompt, held)
        read = _now(device)
        for _ in range(steps):
            token = _next_token(model, token, held)
    return Speed(batch, context, read - began, (_now(device) - read) / steps, cache_bytes(held))


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of the states of tokens in a cache."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(value.nbytes for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor))


def _next_token(model: Any, ids: Tensor, cache: Cache) -> Tensor:
    """Return the most likely next token of each sequence, int64 (batch, 1), for `ids` (batch, length).

    `cache` contains the keys and values of the tokens before `ids`; those of `ids` are added.
    """
    last = {"logits_to_keep": 1} if "logits_to_keep" in argument_names(model) else {}
    logits: Tensor = model(ids, **cache_argument(model, cache), **last).logits
    return logits[:, -1:].argmax(-1)


def _now(device: torch.device) -> float:
    """Wait for all work on the device and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
