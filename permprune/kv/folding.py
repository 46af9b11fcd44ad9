"""The order of the values of a pruned cache, folded into a model's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permprune.coupling.discovery import discover
from permprune.coupling.fold import fold_all
from permprune.coupling.space import ChannelSpace, Coupling
from permprune.errors import PermpruneError
from permprune.kv.files import LayerChannels
from permprune.kv.packing import Channels


def fold_values(model: PreTrainedModel, channels: LayerChannels, example: Mapping[str, Tensor]) -> LayerChannels:
    """Permute weights in place so that values come in their stored order; return the channels for the new weights.

    The rows that write the values and the columns that read the output of attention are permuted, which leaves the
    model's outputs unchanged. `example` are arguments of the model, with which its graph is traced (`discover`). Raises
    `PermpruneError`, before any weight is changed, if the graph does not show which weights these are.
    """
    coupling = discover(model, example)
    tables = {_space(model, coupling, i, values).name: values.order for i, (_, values) in channels.items()}
    fold_all(model, tables, coupling)
    folded = {}
    for i, (keys, values) in channels.items():
        heads, width = values.shape
        folded[i] = keys, dataclasses.replace(values, order=torch.arange(width).repeat(heads, 1))
    return folded


def _space(model: PreTrainedModel, coupling: Coupling, number: int, values: Channels) -> ChannelSpace:
    """Return the space of a layer's value channels: inside its attention, with a block for each head, and read."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if getattr(module, "layer_idx", None) == number)
    spaces = [
        space
        for space in coupling.spaces
        if (space.blocks, space.size) == values.shape
        and space.freedom != "frozen"
        and space.readers
        and all(member.parameter.startswith(inside) for member in space.members)
    ]
    if len(spaces) != 1:
        raise PermpruneError(
            f"the order of the values of layer {number} cannot be folded, since the model's graph does not show which "
            "weights write and read them: leave out --fold"
        )
    return spaces[0]
