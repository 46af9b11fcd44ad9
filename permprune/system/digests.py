"""Digests of weights and of what a search depends on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from permprune.system.imports import on_first_use

with on_first_use(globals()):
    from transformers import PreTrainedModel

BLOCKS, BLOCK = 64, 1024
"""Of a tensor with more elements than their product, `BLOCKS` evenly spaced runs of `BLOCK` elements are read."""

CONFIG, WEIGHTS, CALIBRATION = "model config", "model weights", "calibration examples"
"""Names of digests among the settings that a state depends on."""

ROUNDED = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The types of `rounded_digests`."""

ORIGIN = ("_name_or_path", "transformers_version")
"""Entries of a config that describe its origin, not the model."""


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    return {f"{name} version": importlib.metadata.version(name) for name in ("permprune", "torch", "transformers")}


def model_digests(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return digests of a model's class and config, and of its named weights; large weights are sampled (`BLOCKS`)."""
    config = {"class": type(model).__name__, **model.config.to_dict()}
    text = json.dumps(_without_origin(config), sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return {CONFIG: digest, WEIGHTS: digest_of((name, _sampled(tensor)) for name, tensor in weights)}


def rounded_digests(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return digests of tensors with floating-point numbers rounded to each of `ROUNDED`; large ones are sampled.

    Copies of a model that are loaded in fp32, bf16 or fp16 have one of them in common.
    """
    sampled = [(name, _sampled(tensor)) for name, tensor in tensors]
    return {
        kind: digest_of((name, tensor.to(dtype) if tensor.is_floating_point() else tensor) for name, tensor in sampled)
        for kind, dtype in ROUNDED.items()
    }


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of the names, types, shapes and values of tensors, on any device."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sampled(tensor: Tensor) -> Tensor:
    """Return all elements of a small tensor, or blocks of a large one, flattened."""
    flat = tensor.detach().flatten()
    if len(flat) > BLOCKS * BLOCK:
        starts = [(len(flat) - BLOCK) * i // (BLOCKS - 1) for i in range(BLOCKS)]
        flat = torch.cat([flat[start : start + BLOCK] for start in starts])
    return flat


def _without_origin(value: Any) -> Any:
    """Return a config without the entries that describe its origin, which change when a checkpoint is moved."""
    if isinstance(value, dict):
        return {str(key): _without_origin(item) for key, item in value.items() if key not in ORIGIN}
    return [_without_origin(item) for item in value] if isinstance(value, list | tuple) else value
