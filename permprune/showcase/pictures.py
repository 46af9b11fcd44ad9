"""Thumbnails of the images that a model reads."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

SIDE = 96
"""The longest side of a thumbnail in pixels."""


def thumbnail(pixels: Tensor, processor: Any) -> str | None:
    """Return a thumbnail of an image (channels, height, width) as a model reads it: a JPEG file in base64.

    The normalisation of the image processor is undone. Returns None for a tensor that is not an image of 1 or 3
    channels.
    """
    if pixels.dim() != 3 or pixels.shape[0] not in (1, 3):
        return None
    image = pixels.float().cpu()
    if getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(getattr(processor, name)).reshape(-1, 1, 1) for name in ("image_mean", "image_std"))
        image = image * std + mean
    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).expand(-1, -1, 3)
    picture = Image.fromarray(levels.contiguous().numpy())
    picture.thumbnail((SIDE, SIDE))
    file = BytesIO()
    picture.save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode("ascii")
