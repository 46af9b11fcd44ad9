"""Passes of a model that is run without numbers: what a batch, or a single example, takes in memory and operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from permprune.config import PruneConfig
from permprune.examples import Examples
from permprune.forecasts.activations import Activations, Gradients, count_activations
from permprune.losses.targets import next_token
from permprune.models.dummy_inputs import example_inputs
from permprune.models.forward import forward_arguments, is_causal_lm, main_outputs
from permprune.models.modality import BATCH_MULTIPLIER, Kind, fitting_length, kind_of
from permprune.models.processors import takes_pairs
from permprune.models.shallow import Repetition
from permprune.pruning.problem import Outline

TYPICAL: dict[Kind, int] = {"sentences": 64, "embeddings": 64, "speech": 64}
"""The tokens that are assumed of a sentence and of a transcript, where they determine the work and not the memory."""

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of a batch, by the names of the model's arguments."""

UNCOUNTED = Activations(blocks=0, logits=0, positions=0, outputs=0)
"""Those of a pass whose memory is not asked for."""


def example_pass(
    model: PreTrainedModel,
    config: PruneConfig,
    *,
    shown: Shapes | None = None,
    size: tuple[int, int] | None = None,
    lists: Sequence[Repetition] = (),
) -> Activations:
    """Count what the model computes forward for one example, of the shapes `shown` or of `TYPICAL` length.

    The model may be on the meta device. `size` is as in `Subject`, and blocks in `lists` are not run.
    """
    shapes = _shapes(model, 1, min(config.length, TYPICAL.get(kind_of(model), config.length)), size)
    loss = _loss(model, {name: (shown or {}).get(name, shape) for name, shape in shapes.items()})
    return count_activations(model, loss, gradients="none", dtype=torch.float32, lists=lists)


def batch_pass(
    model: PreTrainedModel,
    outline: Outline,
    gradients: Gradients,
    *,
    config: PruneConfig,
    dtype: torch.dtype,
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    ends: torch.dtype | None = None,
) -> Activations:
    """Count the activations of a batch of this many windows, by default `config.batch`.

    The weights of the model's ends have type `ends`, by default that of the layers.
    """
    shapes = _shapes(model, (batch or config.batch) * BATCH_MULTIPLIER[kind_of(model)], config.length, size)
    return count_activations(
        model,
        _loss(model, shapes),
        gradients=gradients,
        dtype=dtype,
        recompute=config.recompute and gradients != "none",
        lists=outline.repeated,
        held=outline.dtype if gradients == "inputs" and dtype == outline.dtype else torch.float32,
        ends=ends or outline.dtype,
    )


def _shapes(model: PreTrainedModel, count: int, length: int, size: tuple[int, int] | None) -> Shapes:
    """The shapes of a batch of `count` examples, of texts with `length` tokens and of images of this size.

    Of texts with images only the text: how many tokens an image is depends on its numbers.
    """
    length = fitting_length(model, length)
    if takes_pairs(model):
        return {"input_ids": (count, length)}
    shapes = {name: (count, *tensor.shape[1:]) for name, tensor in example_inputs(model).items()}
    if size and len(image := shapes.get("pixel_values", ())) == 4:
        shapes["pixel_values"] = (*image[:2], *size)
    return shapes | {name: (count, length) for name in ("input_ids", "decoder_input_ids") if name in shapes}


def _loss(model: PreTrainedModel, shapes: Shapes) -> Callable[[nn.Module], Tensor]:
    """A pass over a batch to the loss of text, or else to the sum of the outputs, which keeps as much memory."""
    is_text = is_causal_lm(model) and shapes.keys() == {"input_ids"}

    def loss(model: nn.Module) -> Tensor:
        batch = {
            name: torch.zeros(shape, dtype=torch.int64 if name.endswith("_ids") else torch.float32)
            for name, shape in shapes.items()
        }
        if is_text:
            return next_token(model, Examples(batch)).loss()
        outputs = main_outputs(model(**forward_arguments(model, batch)))
        return torch.stack([output.float().sum() for output in outputs if isinstance(output, Tensor)]).sum()

    return loss
