"""Running a model: its arguments, its outputs, and what it can do."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from permprune.errors import PermpruneError
from permprune.examples import IGNORED, Examples
from permprune.models.padding import Padding


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside, and dropout is off; both are as before afterwards."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(training)


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and no key/value cache inside the block; everything as before after it."""
    training = [module for module in model.modules() if module.training]
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    model.eval()
    for config in caching:
        config.use_cache = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for config in caching:
            config.use_cache = True


def forward_arguments(model: nn.Module, example: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keyword arguments for a forward pass on the example, without a key/value cache."""
    if not example:
        raise PermpruneError("the example batch is empty: give the tensors that the model's forward takes, by name")
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    return {**example, **({"use_cache": False} if takes_cache else {})}


def main_outputs(output: Any) -> list[Any]:
    """What must stay as it is: the logits where the output has them, else every tensor in it.

    The outputs of a model's parts that it hands on among its own are not what it was asked for.
    """
    if getattr(output, "logits", None) is not None:
        output = output.logits
    elif isinstance(output, ModelOutput):
        output = [value for value in output.values() if not isinstance(value, ModelOutput)]
    return list(_pytree.tree_leaves(output))


def short_inputs(model: PreTrainedModel, examples: Examples) -> dict[str, Tensor]:
    """Two examples as arguments of the model's forward, of windows of text the first few tokens; no attention masks."""
    inputs = model_inputs(model, examples[torch.arange(2) % len(examples)])
    if inputs.keys() == {"input_ids"}:
        return {"input_ids": inputs["input_ids"][:, :16]}
    return {name: tensor for name, tensor in inputs.items() if not name.endswith("attention_mask")}


def run_model(model: nn.Module, batch: Examples) -> Any:
    """The model's output for a batch. Raises `PermpruneError` where a decoder has nothing to read."""
    return model(**forward_arguments(model, model_inputs(model, batch, _decoder_labels(model, batch))))


def padding_of(model: nn.Module, batch: Examples) -> Padding:
    """Which positions are padding when the model runs on a batch, those of a decoder included."""
    decoder, labels = batch.get("decoder_attention_mask"), _decoder_labels(model, batch)
    if decoder is None and labels is not None:
        decoder = labels != IGNORED
    return Padding.of(batch.get("attention_mask"), decoder)


def _decoder_labels(model: nn.Module, batch: Examples) -> Tensor | None:
    """The labels (batch, length) that a decoder reads as its text; None for other models.

    They are one column longer than the batch's where those have the shape of the encoder's mask (see `Padding`).
    """
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if labels is None or labels.dim() != 2 or not decodes(model) or "decoder_attention_mask" in batch:
        return None
    return F.pad(labels, (0, 1), value=IGNORED) if mask is not None and mask.shape == labels.shape else labels


def model_inputs(model: nn.Module, batch: Examples, labels: Tensor | None = None) -> dict[str, Tensor]:
    """The arguments of the model's forward: all but the labels, which a decoder reads as its text, shifted by one.

    `labels` are those of the batch unless given. Raises `PermpruneError` where a decoder has nothing to read.
    """
    inputs = {name: batch[name] for name in batch if name != "labels"}
    if decodes(model) and "decoder_input_ids" not in inputs:
        labels = batch.get("labels") if labels is None else labels
        if labels is None and "input_ids" not in batch:
            raise PermpruneError("this model has a decoder, which needs text to read: give the examples labels")
        if labels is not None and labels.dim() == 2:
            config: Any = model.config
            ids = labels.masked_fill(labels == IGNORED, config.pad_token_id or 0).roll(1, 1)
            ids[:, 0] = config.decoder_start_token_id
            inputs["decoder_input_ids"] = ids
    return inputs


def decodes(model: nn.Module) -> bool:
    """Whether the model has an encoder, and a decoder that reads other text."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def writes(model: nn.Module) -> bool:
    """Whether the model predicts each next token of what it reads."""
    return bool(getattr(model, "can_generate", bool)()) and not decodes(model)
