"""Second moments of the gradients of kept weights, factored into those of rows and of channels."""

from __future__ import annotations

import torch
from torch import Tensor

from permprune.kernels.adam.step import squared_sums
from permprune.kernels.search.masks import unpack_mask

TINY = 1e-30
"""The least mean of squares by which others are divided."""


class SecondMoments:
    """Running means of the squared gradients of a layer's kept weights, of each row and of each channel.

    The second moment of a weight is estimated as the product of those of its row and its channel over that of all
    weights (Adafactor, Shazeer & Stern 2018, arXiv 1804.04235, section 3): rows + channels numbers take the place of
    rows x kept.

    `bits` is the mask of the layer (`pack_mask`), which has so many `channels`. The `means`, fp32 (rows + channels,),
    start from 0, or from `saved` ones.
    """

    def __init__(self, bits: Tensor, channels: int, saved: Tensor | None = None) -> None:
        mask = unpack_mask(bits, channels)
        self._bits, self._kept, self._rows = bits, int(mask[0].sum()), mask.sum(0, dtype=torch.float32)
        self.means = self._rows.new_zeros(len(mask) + channels)
        if saved is not None:
            self.means.copy_(saved)

    def with_gradient(self, gradient: Tensor, *, step: int, beta: float) -> tuple[Tensor, Tensor]:
        """Add the gradient of a step, from 1, to the means, which decay by `beta`.

        The gradient is (rows, channels). Returns two tensors, fp32 (rows,) and (channels,), the outer product of which
        are the roots of the second moments without their bias.
        """
        of_rows, of_channels = squared_sums(gradient, self._bits)
        means = torch.cat([of_rows / self._kept, of_channels / self._rows.clamp_min(1)])
        by_row, by_channel = self.means.lerp_(means, 1 - beta).split([len(gradient), gradient.shape[1]])
        mean = by_channel @ self._rows / self._rows.sum()
        return (by_row / (mean.clamp_min(TINY) * (1 - beta**step))).sqrt(), by_channel.sqrt()
