"""Running a model: the arguments of its forward, its outputs, its type (decoder, generative), and its nested config."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils import _pytree
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from permprune.errors import PermpruneError
from permprune.examples import IGNORED, SIZES, Examples
from permprune.models.experts import Routed
from permprune.system.device import compute_device

DECODER_TEXTS = {"decoder_input_ids": 0, "decoder_attention_mask": 0, "labels": IGNORED}
"""Names of the tensors of a decoder's texts, (batch, length), each with the value that pads it."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which all modules are in evaluation mode; the mode of each is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:  # model.eval() may also exchange its kernels
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def requiring_gradients(parameters: Iterable[nn.Parameter], *, required: bool = True) -> Iterator[None]:
    """A context in which these parameters require gradients, or do not; restored afterwards."""
    changed = [parameter for parameter in parameters if parameter.requires_grad is not required]
    try:
        for parameter in changed:
            parameter.requires_grad_(required)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not required)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A context in which no parameter requires gradients and the model is in evaluation mode; restored afterwards."""
    with requiring_gradients(model.parameters(), required=False), evaluating(model):
        yield


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """A context of evaluation mode, without gradients and without key/value caches; restored afterwards."""
    with without_caches(model), evaluating(model), torch.no_grad():
        yield


@contextmanager
def without_hub_kernels(model: nn.Module) -> Iterator[None]:
    """A context without the kernels of the Hub that Transformers uses, which cannot be traced; restored afterwards."""
    if (mode := getattr(model, "kernels_mode", None)) is None:
        yield
        return
    model.reset_kernels()  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_use_kernels(True, mode=mode)  # type: ignore[operator]


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """A context without key/value caches, which blocks that run twice would fill twice; restored afterwards.

    Forward methods of whole models, such as LLaVA's, need not take `use_cache`, which the config of a part sets.
    """
    configs = {id(config): config for module in model.modules() if (config := vars(module).get("config"))}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


def kept_in_fp32(model: nn.Module, *dtypes: torch.dtype) -> re.Pattern[str]:
    """What is found in the names of the tensors that Transformers keeps in fp32 in a model of one of these types."""
    kinds = ("", "_strict") if torch.float16 in dtypes else ("_strict",) if torch.bfloat16 in dtypes else ()
    lists = [getattr(model, f"_keep_in_fp32_modules{kind}", None) or () for kind in kinds]
    return re.compile("|".join(itertools.chain(*lists)).replace("*", ".*") or "(?!)")  # which is nowhere


def stored_as(model: nn.Module, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Context manager: floating-point tensors of the state dict are in the types of a checkpoint; restored on exit.

    These are `dtype`, and for some modules fp32 (`kept_in_fp32`).
    """
    wide, named = kept_in_fp32(model, dtype), model.state_dict(keep_vars=True).items()
    return _cast([tensor for name, tensor in named if not wide.search(name)], dtype)


def computed_in(model: nn.Module, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Context manager: all floating-point parameters and buffers of the model are cast to `dtype`; restored on exit."""
    return _cast([*model.parameters(), *model.buffers()], dtype)


@contextmanager
def _cast(tensors: Iterable[Tensor], dtype: torch.dtype) -> Iterator[None]:
    before = [(tensor, tensor.data) for tensor in tensors if tensor.is_floating_point() and tensor.dtype != dtype]
    try:
        for tensor, data in before:
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def forward_arguments(model: nn.Module, example: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keyword arguments for a forward pass on an example batch (`typed_inputs`), with the key/value cache disabled.

    Raises `PermpruneError` if the batch is empty.
    """
    if not example:
        raise PermpruneError("the example batch is empty: give the tensors that the model's forward takes, by name")
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    return {**typed_inputs(model, example), **({"use_cache": False} if takes_cache else {})}


def typed_inputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs by name, with images and sound in the widest type of the model's parameters (`NarrowWeights`).

    Modules that Transformers keeps in fp32 in a model of 16 bits do not count.
    """
    if not any(tensor.is_floating_point() for tensor in inputs.values()):
        return dict(inputs)
    kept = kept_in_fp32(model, torch.float16, torch.bfloat16)
    dtypes = [p.dtype for name, p in model.named_parameters() if p.is_floating_point() and not kept.search(name)]
    dtype = max(dtypes, key=lambda one: one.itemsize, default=torch.float32)
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword argument that gives a cache to a model's forward or `generate`; older releases have another name."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}


def main_outputs(output: Any) -> list[Any]:
    """The outputs that a permutation must not change: the logits if there are any, else every tensor of the output.

    Nested `ModelOutput`s, the outputs of a model's submodels, are left out.
    """
    if getattr(output, "logits", None) is not None:
        output = output.logits
    elif isinstance(output, ModelOutput):
        output = [value for value in output.values() if not isinstance(value, ModelOutput)]
    return list(_pytree.tree_leaves(output))


def side_outputs(output: Any) -> list[tuple[str, Any]]:
    """The other tensors that a model returns, each with its name, such as "text_model_output.last_hidden_state".

    The entries of a sequence, such as the hidden states of all layers, have one name.
    """
    main = {id(leaf) for leaf in main_outputs(output)}
    return [(name, leaf) for name, leaf in _named("", output) if id(leaf) not in main]


def _named(name: str, output: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(output, Mapping):
        for key, value in output.items():
            yield from _named(f"{name}.{key}".removeprefix("."), value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _named(name, value)
    else:
        yield name, output


def short_inputs(model: nn.Module, examples: Examples) -> dict[str, Tensor]:
    """The model's arguments for two examples, on its device and without masks of padding; text is cut to 16 tokens."""
    inputs = model_inputs(model, examples[torch.arange(2) % len(examples)].to(compute_device(model)))
    inputs = {name: tensor for name, tensor in inputs.items() if name in SIZES or not name.endswith("attention_mask")}
    return {"input_ids": inputs["input_ids"][:, :16]} if inputs.keys() == {"input_ids"} else inputs


def run_model(model: nn.Module, batch: Examples) -> Any:
    """The model's output for a batch. Raises `PermpruneError` if the batch has no input for the model's decoder."""
    with without_caches(model):
        return model(**forward_arguments(model, model_inputs(model, _told_apart(model, batch))))


def padding_of(model: nn.Module, batch: Examples) -> Padding:
    """The padded positions of a batch, in the encoder's and the decoder's sequence."""
    batch = _told_apart(model, batch)
    labels, decoder = batch.get("labels"), batch.get("decoder_attention_mask")
    if decoder is None and labels is not None and labels.dim() == 2 and is_encoder_decoder(model):
        decoder = labels != IGNORED
    readers: frozenset[nn.Module] | None = None
    if {"pixel_values", "input_ids"} <= set(batch) and not is_encoder_decoder(model):
        readers = frozenset(cast(PreTrainedModel, model).get_decoder().modules())
    return Padding.of(_encoder_mask(model, batch), decoder, readers=readers)


def _encoder_mask(model: nn.Module, batch: Examples) -> Tensor | None:
    """The mask of the positions that the encoder computes, which for a wave are frames of many samples."""
    mask, of_frames = batch.get("attention_mask"), getattr(model, "_get_feature_vector_attention_mask", None)
    if mask is None or of_frames is None or "input_values" not in batch:
        return mask
    count = model._get_feat_extract_output_lengths(mask.shape[1], add_adapter=False)  # type: ignore[operator]
    frames: Tensor = of_frames(int(count), mask, add_adapter=False)
    return frames


def _told_apart(model: nn.Module, batch: Examples) -> Examples:
    """The batch with a column of padding more in the decoder's texts that have the shape of the encoder's mask.

    So the two sequences can be told apart by shape (see `Padding`).
    """
    mask = _encoder_mask(model, batch) if is_encoder_decoder(model) else None
    if mask is None:
        return batch
    alike = [name for name in DECODER_TEXTS if name in batch and batch[name].shape == mask.shape]
    texts = {name: batch[name] for name in alike}
    if alike == ["decoder_input_ids"]:
        texts["decoder_attention_mask"] = torch.ones_like(mask)
    padded = {name: F.pad(text, (0, 1), value=DECODER_TEXTS[name]) for name, text in texts.items()}
    return batch.with_tensors(padded)


def model_inputs(model: nn.Module, batch: Examples) -> dict[str, Tensor]:
    """The arguments of the model's forward: the batch without its labels.

    For an encoder-decoder model, the labels (batch, length), shifted right by one, become `decoder_input_ids` unless
    the batch has them. Raises `PermpruneError` if the batch has no input for the decoder.
    """
    inputs = {name: batch[name] for name in batch if name != "labels"}
    if is_encoder_decoder(model) and "decoder_input_ids" not in inputs:
        labels = batch.get("labels")
        if labels is None and "input_ids" not in batch:
            raise PermpruneError("the decoder of this model needs text: give the examples labels")
        if labels is not None and labels.dim() == 2:
            config: Any = model.config
            ids = labels.masked_fill(labels == IGNORED, config.pad_token_id or 0).roll(1, 1)
            ids[:, 0] = config.decoder_start_token_id
            inputs["decoder_input_ids"] = ids
    return inputs


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model is an encoder-decoder model."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def is_ctc(model: nn.Module) -> bool:
    """Whether the model recognises speech by CTC: it returns logits for each frame, and transcripts tell no frames."""
    mapping: Any = transformers.MODEL_FOR_CTC_MAPPING
    kind = mapping.get(type(getattr(model, "config", None)), None)
    return kind is not None and isinstance(model, kind)


def writes_text(model: nn.Module) -> bool:
    """Whether the model writes a text of its own for an input, such as a transcript or a translation."""
    return is_encoder_decoder(model) or is_ctc(model)


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the model is a decoder-only language model, which predicts the next token of its input."""
    return bool(getattr(model, "can_generate", bool)()) and not is_encoder_decoder(model)


def argument_names(model: PreTrainedModel) -> list[str]:
    """The names of the keyword arguments of the model's forward."""
    kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    return [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds]


def find_config(config: PreTrainedConfig, *fields: str) -> Any:
    """The outermost config, among a config and those nested in it, in which no field is None; None if there is none."""
    having = (one for one in nested_configs(config) if all(getattr(one, field, None) is not None for field in fields))
    return next(having, None)


def nested_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a config and all configs nested in it, breadth first."""
    level = [config]
    while level:
        yield from level
        level = [value for one in level for value in vars(one).values() if isinstance(value, PreTrainedConfig)]


@dataclass(frozen=True)
class Padding:
    """The padding of one batch.

    `masks` are bool tensors (batch, length), False at padding: one per sequence that the model reads. Their shapes
    differ, so the shape of an activation tells to which sequence it belongs. `readers` are the modules that read these
    sequences, which the vision encoder of a vision-language model does not; None for all.
    """

    masks: tuple[Tensor, ...] = ()
    readers: Set[nn.Module] | None = None

    @classmethod
    def of(cls, *masks: Tensor | None, readers: Set[nn.Module] | None = None) -> Padding:
        """Create the padding from masks of any dtype that are 0 at padding; None entries are ignored."""
        return cls(tuple(mask.bool() for mask in masks if mask is not None), readers)

    def mask_of(self, x: Tensor, routed: Routed | None = None, module: nn.Module | None = None) -> Tensor | None:
        """The mask that belongs to activations x, (batch, length, channels) or (batch * length, channels).

        It has the shape of x without the channels; None if x has no padding. Of an expert's rows, `routed` tells of
        which tokens they are. `module` reads or computes x; None if x are outputs of the model.
        """
        if module is not None and self.readers is not None and module not in self.readers:
            return None
        for mask in self.masks:
            if routed is not None and routed.total == mask.numel():
                return mask.flatten()[routed.places]
            if routed is None and x.shape[:-1] in (mask.shape, (mask.numel(),)):
                return mask.reshape(x.shape[:-1])
        return None

    def real(self, x: Tensor, routed: Routed | None = None, module: nn.Module | None = None) -> Tensor:
        """The activations that are not padding, (positions, channels); x itself if it has none (see `mask_of`)."""
        mask = self.mask_of(x, routed, module)
        return x if mask is None else x[mask]
