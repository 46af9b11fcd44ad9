"""The kind of input that a model takes: text, sentences to label or to embed, images or speech; and how much of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Literal

from permprune.errors import PermpruneError
from permprune.options import nearest
from permprune.system.imports import on_first_use
from permprune.system.progress import log

with on_first_use(globals()):
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F
    from transformers import PreTrainedModel

    from permprune.models.forward import argument_names, is_causal_lm

Kind = Literal["text", "sentences", "embeddings", "images", "speech"]

EXAMPLES_PER_WINDOW: dict[Kind, int] = {"text": 1, "sentences": 32, "embeddings": 8, "images": 8, "speech": 1}
"""Examples that replace one window of text: a window gives many predictions, a sentence or an image only one.

An embedding tells more than a label: fewer are needed, and with fewer in a step there are more steps.
"""

BATCH_MULTIPLIER: dict[Kind, int] = {"text": 1, "sentences": 8, "embeddings": 8, "images": 8, "speech": 1}
"""Number of examples in a batch for each window of text that the batch size counts."""

LIGHT = 2
"""How many batches of a pass with gradients make one of a pass without, which holds few activations."""

EVALUATION_WINDOWS = 24
"""Windows of the evaluation, by default."""

EVALUATION_BATCH = 4
"""Windows of text, or prompts, of a forward pass in the evaluation."""

ANSWERED_ONCE = 32
"""Examples with one label each, such as images, for a window of text in the evaluation: many, to measure as well."""

TASK = "embedding"
"""The task of a sentence encoder, by the name that it is asked for."""

POOLING = "sentence_pooling"
"""The field of a config that names the pooling of a sentence encoder, one of `POOLINGS`."""


_WARNED: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
"""The models of which `clipped_length` has logged a warning."""


def evaluation_count(model: PreTrainedModel, windows: int) -> int:
    """Return the number of examples that so many windows of the evaluation are."""
    return windows * (ANSWERED_ONCE if EXAMPLES_PER_WINDOW[kind_of(model)] > 1 else 1)


def evaluation_batch(model: PreTrainedModel) -> int:
    """Return the number of examples of a forward pass in the evaluation."""
    return EVALUATION_BATCH * BATCH_MULTIPLIER[kind_of(model)]


def kind_of(model: PreTrainedModel) -> Kind:
    """The kind of input that a model takes: windows of text, sentences that it labels or embeds, images, or speech."""
    if model.main_input_name == "pixel_values":
        return "images"
    if model.main_input_name in ("input_features", "input_values"):
        return "speech"
    if pooling_of(model):
        return "embeddings"
    classifies = "labels" in argument_names(model) and model.get_output_embeddings() is None
    return "sentences" if classifies and not is_causal_lm(model) else "text"


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].to(states)
    return (states * weights).sum(1) / weights.sum(1).clamp_min(1)


def _first(states: Tensor, mask: Tensor) -> Tensor:
    return states[torch.arange(len(states), device=states.device), mask.int().argmax(1)]


def _last(states: Tensor, mask: Tensor) -> Tensor:
    positions = torch.arange(mask.shape[1], device=mask.device)
    return states[torch.arange(len(states), device=states.device), (positions * mask).argmax(1)]


def _max(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(~mask[..., None], -torch.inf).amax(1)


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "cls": _first,
    "max": _max,
    "lasttoken": _last,
}
"""Functions of states (batch, length, channels) and a bool mask (batch, length), False at padding, by the names that
Sentence-Transformers gives them."""


def pooling_asked(task: str | None) -> str | None:
    """Return the pooling that a task names: "embedding:pooling=cls"; "" if it names none, and None without a task.

    Raises `PermpruneError` for another task, and for a pooling that is not one of `POOLINGS`.
    """
    if task is None:
        return None
    name, colon, option = task.partition(":")
    key, _, pooling = option.partition("=")
    if name != TASK or (colon and key != "pooling"):
        raise PermpruneError(f'the task is "{task}": give {TASK}, or {TASK}:pooling={"|".join(POOLINGS)}')
    if colon and pooling not in POOLINGS:
        raise PermpruneError(f'unknown pooling "{pooling}": {nearest(pooling, POOLINGS)}')
    return pooling


def pooling_of(model: PreTrainedModel) -> str | None:
    """Return the pooling of a sentence encoder; None for other models, and for encoders that got a head."""
    pooling: str | None = getattr(getattr(model, "config", None), POOLING, None)
    if pooling is None:
        return None
    has_head = model.get_output_embeddings() is not None or "labels" in argument_names(model)
    return None if has_head else pooling


def embeddings(states: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Pool states (batch, length, channels) to embeddings of length 1, fp32 (batch, channels)."""
    real = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask.bool()
    return F.normalize(POOLINGS[pooling](states.float(), real), dim=1)


def positions_of(model: PreTrainedModel) -> int | None:
    """Return the largest number of tokens that a model reads at once; None if its config does not tell.

    RoBERTa and its relatives number positions from the padding token on, and so cannot use all rows of their table.
    """
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    paddings = [
        table.padding_idx for table in tables if isinstance(table, nn.Embedding) and table.num_embeddings == most
    ]
    return most - max((1 + padding for padding in paddings if padding is not None), default=0)


def fitting_length(model: PreTrainedModel, length: int) -> int:
    """Return `length`, or the positions of a model of text if they are fewer."""
    most = positions_of(model) if kind_of(model) in ("text", "sentences", "embeddings") else None
    return length if most is None else min(length, most)


def clipped_length(model: PreTrainedModel, length: int) -> int:
    """Return `fitting_length`; a warning says once for each model if it is less than `length`."""
    fitting = fitting_length(model, length)
    if fitting < length and model not in _WARNED:
        _WARNED.add(model)
        log.warning("the model has %d positions: the length is %d tokens in place of %d", fitting, fitting, length)
    return fitting
