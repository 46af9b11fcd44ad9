"""Small example batches for tracing: random inputs derived from a model's signature and config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.models.forward import argument_names, find_config, nested_configs, typed_inputs
from permprune.models.processors import Processor, encode_pair, pair_processor_of, takes_pairs
from permprune.system.device import compute_device

BATCH, LENGTH = 2, 11
"""Sequences in an example batch, and tokens per sequence: a prime, which is unlikely to be another size as well."""

SECOND = 16_000
"""Audio samples per example if the config does not define the frame size: one second at 16 kHz."""

EXAMPLE = "give an example batch in Python, permprune.inspect(model, example={...})"
"""What to do if no inputs can be made up."""

FRAMES = 64
"""Audio frames per example for models that accept any number of frames."""


def example_inputs(model: PreTrainedModel, processor: object = None) -> dict[str, Tensor]:
    """Random keyword arguments for the model's forward, with a fixed seed, in the model's dtype and on its device.

    * Text: `input_ids` (2, 11), and `decoder_input_ids` (2, 11) for an encoder-decoder model.
    * Images: `pixel_values` (2, channels, height, width), or (2, frames, channels, height, width) for video; packed
      patches (patches, numbers) of two images of different sizes for a model that takes `image_grid_thw` (2, 3).
    * Audio: `input_features` (2, bands, frames) or (2, frames, bands), or `input_values` (2, samples).

    A multimodal model receives every modality that its config describes, and its text contains one placeholder token
    per image feature; on the meta device, where these cannot be counted, it receives text only. A vision-language model
    with its `processor` receives what that makes of two images of different sizes. Raises `PermpruneError` if a
    required argument cannot be derived from the config.
    """
    on_meta = next(model.parameters()).is_meta
    if takes_pairs(model) and isinstance(processor, ProcessorMixin) and not on_meta:
        return _as_the_model(_processed_pairs(model, processor), model)
    parameters = inspect.signature(model.forward).parameters
    maker = _Maker(model.config, processor, parameters)
    needed = {name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    if model.main_input_name in maker.known:
        needed.add(model.main_input_name)
    made = {name: tensor for name in maker.known if name in parameters and (tensor := maker.known[name]()) is not None}
    if {"input_features", "input_values"} <= made.keys() - needed:
        del made["input_values"]
    if missing := sorted(needed - made.keys()):
        raise PermpruneError(
            f"{type(model).__name__} takes {missing[0]}, which cannot be generated from its config: {EXAMPLE}"
        )
    example = _as_the_model(made, model)
    if {"input_ids", "pixel_values"} <= example.keys() and (owner := find_config(model.config, "image_token_id")):
        if on_meta:
            return {name: example[name] for name in example if name not in ("pixel_values", "image_grid_thw")}
        example["input_ids"] = _with_placeholders(model, example, owner.image_token_id)
        if "mm_token_type_ids" in parameters:
            example["mm_token_type_ids"] = example["input_ids"].eq(owner.image_token_id).int()
    return example


class _Maker:
    """Functions that create arguments of a model's forward from its config, by name (`known`).

    They return None if the config lacks the necessary fields. Labels and optional masks are not needed for tracing.
    """

    def __init__(self, config: PreTrainedConfig, processor: object, parameters: Container[str]) -> None:
        self.config, self.processor, self.parameters = config, processor, parameters
        self.generator = torch.Generator().manual_seed(0)
        self.known: dict[str, Callable[[], Tensor | None]] = {
            "input_ids": lambda: self._ids(config.get_text_config()),
            "decoder_input_ids": self._decoder_ids,
            "pixel_values": self._patches if "image_grid_thw" in parameters else self._pixels,
            "image_grid_thw": self._grids,
            "input_features": self._features,
            "input_values": self._wave,
        }

    def _ids(self, config: PreTrainedConfig) -> Tensor | None:
        """Random ordinary tokens, ending with the end-of-sequence token."""
        vocabulary = getattr(config, "vocab_size", None)
        if vocabulary is None:
            return None
        words = _words(self.config, min(vocabulary, 1000))
        ids = words[torch.randint(len(words), (BATCH, LENGTH), generator=self.generator)]
        end = getattr(config, "eos_token_id", None)
        if isinstance(end, int) and end < vocabulary:
            ids[:, -1] = end
        return ids

    def _decoder_ids(self) -> Tensor | None:
        return self._ids(self.config.get_text_config(decoder=True)) if self.config.is_encoder_decoder else None

    def _pixels(self) -> Tensor | None:
        owner = find_config(self.config, "image_size")
        size = owner.image_size if owner else processed_size(self.processor)
        if size is None:
            return None
        if isinstance(size, dict):
            size = size["height"], size["width"]
        height, width = size if isinstance(size, list | tuple) else (size, size)
        owner = owner or find_config(self.config, "num_channels") or self.config
        channels = next((n for key in ("num_channels", "in_channels", "in_chans") if (n := getattr(owner, key, 0))), 3)
        frames = 1 if "pixel_attention_mask" in self.parameters else getattr(owner, "num_frames", None)
        return self._noise(*([frames] if frames else []), channels, height, width)

    def _grids(self) -> Tensor | None:
        """Frames, rows and columns of patches of two images: int64 (2, 3)."""
        owner = find_config(self.config, "spatial_merge_size")
        return owner and torch.tensor([[1, 2, 2], [1, 2, 4]]) * torch.tensor([1, *[owner.spatial_merge_size] * 2])

    def _patches(self) -> Tensor | None:
        owner, grids = find_config(self.config, "patch_size", "temporal_patch_size"), self._grids()
        if owner is None or grids is None:
            return None
        numbers = getattr(owner, "in_channels", 3) * owner.temporal_patch_size * owner.patch_size**2
        return torch.randn(int(grids.prod(1).sum()), numbers, generator=self.generator)

    def _features(self) -> Tensor | None:
        if owner := find_config(self.config, "num_mel_bins", "max_source_positions"):
            return self._noise(owner.num_mel_bins, 2 * owner.max_source_positions)  # 2: stride of the convolutions
        for bands in ("input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins"):
            if owner := find_config(self.config, bands):
                return self._noise(FRAMES, getattr(owner, bands))
        return None

    def _wave(self) -> Tensor | None:
        if owner := find_config(self.config, "num_mel_bins", "max_length"):
            return self._noise(owner.max_length, owner.num_mel_bins)
        samples = SECOND
        if owner := find_config(self.config, "conv_kernel", "conv_stride"):
            samples = FRAMES
            for kernel, stride in zip(reversed(owner.conv_kernel), reversed(owner.conv_stride), strict=True):
                samples = (samples - 1) * stride + kernel
        return self._noise(samples)

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=self.generator)


def random_like(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Random keyword arguments for the model's forward with the shapes and types of `inputs`, with a fixed seed.

    Token ids are ordinary tokens, except where `inputs` have a special one. Floating-point tensors are uniform noise in
    the range of the given ones, with zeros at padding of images. Other tensors, as the sizes of images, are kept.
    """
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in inputs.items():
        if name in ("input_ids", "decoder_input_ids"):
            config = model.config.get_text_config(decoder=name != "input_ids")
            words = _words(model.config, getattr(config, "vocab_size", None) or int(tensor.max()) + 1)
            drawn = words[torch.randint(len(words), tensor.shape, generator=generator)].to(tensor)
            tensors[name] = torch.where(torch.isin(tensor, words.to(tensor.device)), drawn, tensor)
        elif tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator).to(tensor)
            tensors[name] = torch.lerp(tensor.min(), tensor.max(), noise)
            if name == "pixel_values" and (shown := inputs.get("pixel_attention_mask")) is not None:
                tensors[name] *= shown.unsqueeze(-3)  # models leave out parts of images that are all zeros
        else:
            tensors[name] = tensor
    return tensors


def _words(config: PreTrainedConfig, vocabulary: int) -> Tensor:
    """The token ids below `vocabulary` that no field of a config names as special, int64.

    Raises `PermpruneError` if there are no tokens.
    """
    if vocabulary < 1:
        raise PermpruneError(f"vocab_size is {vocabulary}: repair config.json")
    ordinary = torch.ones(vocabulary, dtype=torch.bool)
    for one in nested_configs(config):
        for key, value in vars(one).items():
            if key.endswith(("_token_id", "_token_index")):
                special = [token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)]
                ordinary[[token for token in special if 0 <= token < vocabulary]] = False
    return ordinary.nonzero().flatten() if ordinary.any() else torch.arange(vocabulary)


def processed_size(processor: object) -> tuple[int, int] | None:
    """Height and width of the images that a processor produces; None if it does not define them."""
    processor = getattr(processor, "image_processor", processor)
    for name in ("crop_size", "size"):
        size = dict(getattr(processor, name, None) or {})
        side = size.get("shortest_edge")
        if (height := size.get("height", side)) and (width := size.get("width", side)):
            return height, width
    return None


@torch.no_grad()
def _with_placeholders(model: PreTrainedModel, example: dict[str, Tensor], token: int) -> Tensor:
    """The example's text preceded by one placeholder token per image feature: int64 (2, most features + 11)."""
    images = {name: example[name] for name in ("pixel_values", "image_grid_thw") if name in example}
    try:
        features = model.get_image_features(**images).pooler_output  # type: ignore[operator]
    except TypeError as error:
        raise PermpruneError(
            f"{type(model).__name__} takes more than pixels ({error}): load it with its processor, or {EXAMPLE}"
        ) from error
    ids, longest = example["input_ids"], max(map(len, features))
    rows = []
    for image, text in zip(features, ids, strict=True):
        rows.append(torch.cat([text.new_full((len(image),), token), text[:1].expand(longest - len(image)), text]))
    return torch.stack(rows)


def _processed_pairs(model: PreTrainedModel, processor: Processor) -> dict[str, Tensor]:
    """A processor's inputs for two images of different sizes with texts, without labels."""
    maker, noise = pair_processor_of(processor), np.random.default_rng(0)
    pairs = []
    for width in (112, 224):
        image = Image.fromarray(noise.integers(256, size=(112, width, 3), dtype=np.uint8))
        pairs.append(Examples(encode_pair(maker, image, "what is this?", "noise")))
    joined = Examples.join(pairs)
    return {name: joined[name] for name in joined if name in argument_names(model) and name != "labels"}


def _as_the_model(tensors: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    return typed_inputs(model, {name: tensor.to(compute_device(model)) for name, tensor in tensors.items()})
