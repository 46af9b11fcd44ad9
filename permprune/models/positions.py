"""The positions of a model: the largest number of tokens that it reads at once."""

from __future__ import annotations

import weakref

from torch import nn
from transformers import PreTrainedModel

from permprune.models.modality import kind_of
from permprune.system.progress import log

_WARNED: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
"""The models of which `clipped_length` has logged a warning."""


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
