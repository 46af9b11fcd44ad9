"""What permprune knows of a model that it has read or pruned, kept on the model itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permprune.checkpoints.gathers import Gather, attach_gathers
from permprune.checkpoints.record import Record

ATTRIBUTE = "_permprune_origin"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a model comes from: its name, the type that its weights are stored in, and how it was pruned.

    `record` is None unless permprune pruned the model; `probe` is then what a folder of it is checked by, empty where
    the folder lacks it.
    """

    name: str
    dtype: torch.dtype
    record: Record | None = None
    probe: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def gathers(self) -> list[Gather]:
        return self.record.gathers if self.record else []


def origin_of(model: PreTrainedModel) -> Origin:
    """What is known of a model. One that permprune has not met is stored as it is."""
    known: Origin | None = vars(model).get(ATTRIBUTE)
    return known or Origin(model.config.name_or_path or type(model).__name__, model.dtype)


def set_origin(model: PreTrainedModel, origin: Origin) -> None:
    """Keep on the model what is known of it; copies and pickles of the model keep it too."""
    vars(model)[ATTRIBUTE] = origin


def carry_over(model: PreTrainedModel, whole: PreTrainedModel, rename: Callable[[str], str]) -> None:
    """Give `whole`, which shares a model's weights under other names, its gathers, and what is known of it."""
    origin = origin_of(model)
    if record := origin.record:
        origin = dataclasses.replace(origin, record=_renamed(record, rename))
        attach_gathers(whole, origin.gathers)
    set_origin(whole, origin)


def _renamed(record: Record, rename: Callable[[str], str]) -> Record:
    """The record with other names of modules, and of the spaces and sites that are named after modules."""
    sample, dense = record.sample, record.dense
    return dataclasses.replace(
        record,
        layers=[dataclasses.replace(layer, name=rename(layer.name)) for layer in record.layers],
        dense=None if dense is None else dataclasses.replace(dense, layers=[*map(rename, dense.layers)]),
        permutations={rename(space): table for space, table in record.permutations.items()},
        gathers=[
            dataclasses.replace(
                gather,
                site=rename(gather.site),
                output=rename(gather.output) if gather.output else "",
                inputs=[rename(name) for name in gather.inputs],
            )
            for gather in record.gathers
        ],
        sample=None if sample is None else dataclasses.replace(sample, layer=rename(sample.layer)),
    )
