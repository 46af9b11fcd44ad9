"""Convert Vision Transformers from ONNX files, plain or dynamically quantized, of PyTorch's TorchScript exporter.

The exporter keeps the names of most parameters. Constants that it folds, such as the transposed weights of linear
layers, get new names, but each operation is named after its module: /encoder/layer.0/fc1/MatMul.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
)

HEAD = 64
"""Channels of an attention head, the same in all published sizes of CLIP and DINOv2; the files do not contain it."""

STEPS = ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize")
BICUBIC = 3

CLIP_COLOURS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
IMAGENET_COLOURS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def convert_clip(files: Sequence[Path], folder: Path) -> None:
    """Write CLIP's image tower with its projection (Radford et al. 2021) to `folder` in fp32, with its processor.

    `files` holds the path of one ONNX file.
    """
    (file,) = files
    weights = read_weights(file)
    width, _, patch, _ = weights["vision_model.embeddings.patch_embedding.weight"].shape
    positions = len(weights["vision_model.embeddings.position_embedding.weight"])
    size = patch * math.isqrt(positions - 1)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["vision_model.encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=_layers(weights, "vision_model.encoder.layers."),
        num_attention_heads=width // HEAD,
        patch_size=patch,
        image_size=size,
        projection_dim=len(weights["visual_projection.weight"]),
    )
    _write(CLIPVisionModelWithProjection, config, weights, folder)
    _write_processor("CLIPImageProcessor", size, CLIP_COLOURS, folder)


def convert_dinov2(files: Sequence[Path], folder: Path) -> None:
    """Write the DINOv2 backbone (Oquab et al. 2024) of a network to `folder` in fp32, with a processor.

    `files` holds the path of one ONNX file. The processor produces images of 224 x 224 pixels; the model interpolates
    its position embeddings, learned on a larger grid, to that size.
    """
    (file,) = files
    stored = read_weights(file)
    weights = {name.removeprefix("backbone."): stored[name] for name in stored if name.startswith("backbone.")}
    width, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    grid = _pop(weights, "embeddings.Reshape")
    weights["embeddings.position_embeddings"] = torch.cat([_pop(weights, "embeddings.Concat"), grid], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, width)  # used only in training
    config = Dinov2Config(
        hidden_size=width,
        mlp_ratio=len(weights["encoder.layer.0.mlp.fc1.bias"]) // width,
        num_hidden_layers=_layers(weights, "encoder.layer."),
        num_attention_heads=width // HEAD,
        patch_size=patch,
        image_size=patch * math.isqrt(grid.shape[1]),
    )
    _write(Dinov2Model, config, weights, folder)
    _write_processor("BitImageProcessor", 224, IMAGENET_COLOURS, folder)


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read the parameters in fp32 under their names in PyTorch; weights of linear layers are (outputs, inputs).

    A weight quantized to 8-bit integers is dequantized as (integer - zero point) * scale, with a zero point and a scale
    per output. Other constants that the exporter folded are named after the operation that uses them, e.g.
    "embeddings.Concat_6".
    """
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(file).graph
    arrays = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    weights = {name: array for name, array in arrays.items() if "::" not in name}
    for node in graph.node:
        operation = node.name.strip("/").replace("/", ".")
        for name in arrays.keys() & set(node.input):
            if node.op_type == "MatMul":
                weights[operation.removesuffix("MatMul") + "weight"] = arrays[name].T
            elif node.op_type == "MatMulInteger" and name == node.input[1]:
                levels = arrays[name].astype(np.float32) - arrays[node.input[3]].astype(np.float32)
                scale = arrays[name.removesuffix("quantized") + "scale"]
                weights[operation.removesuffix("MatMul_quant") + "weight"] = (levels * scale).T
            elif node.op_type in ("Concat", "Reshape"):
                weights[operation] = arrays[name]
    return {name: torch.from_numpy(array.astype(np.float32, order="C")) for name, array in weights.items()}


def _pop(weights: dict[str, Tensor], start: str) -> Tensor:
    return weights.pop(next(name for name in weights if name.startswith(start)))


def _layers(weights: dict[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


def _write(kind: type[PreTrainedModel], config: PreTrainedConfig, weights: dict[str, Tensor], folder: Path) -> None:
    """Save a model with these weights to `folder`; Transformers maps the parameter names of its earlier releases.

    Exits if the names do not match those of the installed release.
    """
    loaded: Any = kind.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    model, info = loaded
    wrong = info["missing_keys"] | info["unexpected_keys"]
    if wrong:
        raise SystemExit(f"this release of transformers has different weights ({min(wrong)}): install another release")
    model.save_pretrained(folder)


def _write_processor(kind: str, size: int, colours: dict[str, list[float]], folder: Path) -> None:
    """Write an image processor config: resize the shorter side to `size` pixels, center crop, scale to 0..1, normalize.

    `colours` are the mean and the standard deviation of each color channel.
    """
    processor = {
        "image_processor_type": kind,
        **dict.fromkeys(STEPS, True),
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "resample": BICUBIC,
        "rescale_factor": 1 / 255,
        **colours,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2), encoding="utf-8")
