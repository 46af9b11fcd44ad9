"""Measure how fast a causal language model generates tokens, and how fast other models read their inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from permprune.checkpoints.benchmark import Speed, Throughput
from permprune.examples import Examples
from permprune.models.dummy_inputs import example_inputs, random_like
from permprune.models.forward import argument_names, cache_argument, evaluating, forward_arguments, is_causal_lm
from permprune.models.generation import generate, needs_decoder_inputs
from permprune.models.modality import fitting_length, kind_of
from permprune.system.device import compute_device

ImageSize = tuple[int, int] | None
"""Height and width of images; None for those of the model's config."""

STEPS = 16
"""Default number of tokens that are generated to measure the time per token."""

BATCHES, CONTEXTS = (1, 8, 32), (128, 2048)
"""Default batch sizes, and prompt lengths in tokens, of a causal language model."""

INPUTS, TOKENS = (1, 8, 32, 128), (128,)
"""Default batch sizes, and lengths of texts in tokens, of other models."""


def cells(
    model: PreTrainedModel,
    batches: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    steps: int = STEPS,
) -> list[tuple[int, int]]:
    """Return the batch sizes and context lengths to measure a model at; None stands for its defaults.

    Texts, with the `steps` tokens that are generated after them, have as many tokens as the model has positions, at
    most; the context of images and speech is 0.
    """
    generates = is_causal_lm(model)
    batches = batches or (BATCHES if generates else INPUTS)
    contexts = contexts or (CONTEXTS if generates else TOKENS)
    if generates or kind_of(model) not in ("images", "speech"):
        steps = steps if generates else 0
        contexts = sorted({max(1, fitting_length(model, context + steps) - steps) for context in contexts})
    else:
        contexts = [0]
    return [(batch, context) for context in contexts for batch in batches]


@torch.inference_mode()
def measure_speed(
    model: PreTrainedModel,
    *,
    batch: int,
    context: int,
    steps: int = STEPS,
    cache: Callable[[], Cache] | None = None,
    size: ImageSize = None,
) -> Speed | Throughput:
    """Measure once how fast a causal language model generates, or another model reads inputs.

    A causal language model reads a random prompt of `context` tokens and then generates `steps` tokens greedily,
    `batch` sequences in parallel; `cache` makes its empty key/value cache, by default Transformers' `DynamicCache`.
    Another model reads `batch` random inputs, texts of `context` tokens or images of this `size`, in one forward pass;
    if it is an encoder-decoder that writes text, it generates `steps` tokens as well. Raises `PermpruneError` if there
    are no inputs for the model.
    """
    device, causal = compute_device(model), is_causal_lm(model)
    if causal:
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.get_text_config().vocab_size
        prompt = torch.randint(vocabulary, (batch, context), generator=generator).to(device)
        held = DynamicCache(config=model.config) if cache is None else cache()
    else:
        inputs = batch_inputs(model, batch, context, size)
    with evaluating(model):
        began = _now(device)
        if causal:
            token = _next_token(model, prompt, held)
            read = _now(device)
            for _ in range(steps):
                token = _next_token(model, token, held)
            return Speed(batch, context, read - began, (_now(device) - read) / steps, cache_bytes(held))
        if needs_decoder_inputs(model, inputs):
            generate(model, inputs, steps, at_least=steps)
        else:
            model(**forward_arguments(model, {**inputs}))
        return Throughput(batch, context, _now(device) - began)


def batch_inputs(model: PreTrainedModel, batch: int, context: int, size: ImageSize = None) -> Examples:
    """Return random inputs, one row or image for each of the batch, and texts of `context` tokens unless it is 0.

    Images have the height and width that the model's processor gives them (`size`), or those of its config.
    """
    made = example_inputs(model)
    if size is not None and "pixel_values" in made and made["pixel_values"].dim() == 4:  # others are videos and patches
        made["pixel_values"] = F.interpolate(made["pixel_values"], size)
    if needs_decoder_inputs(model, Examples({name: made[name] for name in made if not name.startswith("decoder_")})):
        made = {name: tensor for name, tensor in made.items() if not name.startswith("decoder_")}
    example = Examples(made)
    many = Examples.join([example] * -(-batch // len(example)))[:batch]
    if not context:
        return many
    first, last = many["input_ids"][:, :1], many["input_ids"][:, -1:]  # a word, and the token that ends a text
    ids = torch.cat([first.expand(-1, context - 1), last], 1)
    return Examples({**many, **random_like(model, {"input_ids": ids})})


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
