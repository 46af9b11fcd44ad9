"""Models by name, and models in memory: what the jobs are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from permprune.errors import PermpruneError
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch
    from transformers import PreTrainedModel

    from permprune.checkpoints.io import read_model
    from permprune.checkpoints.origin import origin_of
    from permprune.models.processors import Processor

if TYPE_CHECKING:
    ModelSource = str | Path | PreTrainedModel
else:
    ModelSource = str | Path  # without the class, whose import takes seconds
"""A zoo name, a folder, a hub id, or a model in memory."""


@dataclass(frozen=True)
class OpenModel:
    """A model in memory, its processor, the type that its weights are stored in, and the name that files call it by."""

    model: PreTrainedModel
    processor: Processor | None
    stored: torch.dtype
    name: str


def open_model(
    source: ModelSource,
    processor: Processor | None = None,
    *,
    task: str | None = None,
    trust_remote_code: bool = False,
) -> OpenModel:
    """The model that a source stands for: read (`read_model`), or as it is.

    `processor` is that of a model in memory; of a model that is read it takes the place of its own. `task` is that of
    `read_model`, for a model that is read. Raises `PermpruneError`.
    """
    if isinstance(source, PreTrainedModel):
        origin = origin_of(source)
        return OpenModel(source, processor, origin.dtype, origin.name)
    if not isinstance(source, str | Path):
        raise PermpruneError(f"a {type(source).__name__} is not a model: give a name, a folder or a PreTrainedModel")
    model, own_processor, stored = read_model(str(source), task=task, trust_remote_code=trust_remote_code)
    return OpenModel(model, own_processor if processor is None else processor, stored, str(source))


def name_of(source: ModelSource) -> str:
    """What files call the model by."""
    return origin_of(source).name if isinstance(source, PreTrainedModel) else str(source)
