"""Models by name, and models in memory: what the jobs are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permprune.errors import PermpruneError
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch
    from transformers import PreTrainedModel

    from permprune.checkpoints.io import read_as_stored, read_model
    from permprune.checkpoints.origin import origin_of
    from permprune.models.layers import is_packed
    from permprune.models.narrow_weights import NarrowWeights
    from permprune.models.processors import Processor

if TYPE_CHECKING:
    ModelSource = str | Path | PreTrainedModel
else:
    ModelSource = str | Path  # without the class, whose import takes seconds
"""A zoo name, a folder, a hub id, or a model in memory."""


@dataclass(frozen=True)
class OpenModel:
    """A model in memory, its processor, the type that its weights are stored in, and the name that files call it by.

    `held` are its weights that are in bf16 although it computes in fp32; None if it was not read in this way.
    """

    model: PreTrainedModel
    processor: Processor | None
    stored: torch.dtype
    name: str
    held: NarrowWeights | None = None


def open_model(
    source: ModelSource,
    processor: Processor | None = None,
    *,
    task: str | None = None,
    trust_remote_code: bool = False,
    narrow: bool = False,
) -> OpenModel:
    """The model that a source stands for: read (`read_model`), or as it is.

    `processor` is that of a model in memory; of a model that is read it takes the place of its own. `task` is that of
    `read_model`, for a model that is read. If it is `narrow`, weights that its checkpoint stores in bf16 are held in it
    (`NarrowWeights`). Raises `PermpruneError`.
    """
    if isinstance(source, PreTrainedModel):
        origin = origin_of(source)
        return OpenModel(source, processor, origin.dtype, origin.name)
    if not isinstance(source, str | Path):
        raise PermpruneError(f"a {type(source).__name__} is not a model: give a name, a folder or a PreTrainedModel")
    options: dict[str, Any] = {"task": task, "trust_remote_code": trust_remote_code}
    held = None
    if narrow:
        model, own_processor = read_as_stored(str(source), **options)
        stored, held = model.dtype, None if is_packed(model) else NarrowWeights.as_read(model)
    else:
        model, own_processor, stored = read_model(str(source), **options)
    return OpenModel(model, own_processor if processor is None else processor, stored, str(source), held)


def name_of(source: ModelSource) -> str:
    """What files call the model by."""
    return origin_of(source).name if isinstance(source, PreTrainedModel) else str(source)
