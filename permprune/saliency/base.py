"""The interface of saliency metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from permprune.options import require_fields
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Scale:
    """The factors by which the magnitudes of a layer's weights are multiplied, as a sum of k outer products.

    `channels` is fp32 (k, channels) and `rows` fp32 (rows, k). Without `rows`, k is 1 and the factors are the same for
    all rows.
    """

    channels: Tensor
    rows: Tensor | None = None

    def score(
        self, weight: Tensor, rows: slice | Tensor = slice(None), channels: slice | Tensor = slice(None)
    ) -> Tensor:
        """Return the scores of some weights, fp32 (rows, channels) in the memory layout of `weight`.

        `weight` are the weights of these `rows` and `channels` of the layer, each a slice or int64 indices.
        """
        size, factors = weight.float().abs(), self.channels[:, channels]
        if self.rows is None:
            return size.mul_(factors[0])
        products = [row[:, None] * channel for row, channel in zip(self.rows[rows].T, factors, strict=True)]
        return size.mul_(sum(products[1:], products[0]))


@dataclass(frozen=True)
class Saliency(ABC):
    """A score for each weight of a layer: in every group the weights with the largest scores are kept.

    A score is the magnitude of the weight times a factor that depends on its row and its channel, so that a search can
    compute scores when it needs them instead of storing them.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        require_fields(self)

    @abstractmethod
    def scale(
        self, weight: Float[Tensor, "rows channels"], moments: Float[Tensor, "channels channels"]
    ) -> Float[Tensor, " channels"] | Scale:
        """Return the non-negative factors of a layer's magnitudes: fp32 (channels,), or a `Scale`.

        `weight` is (rows, channels) = (outputs, inputs); `moments` are the second moments of the inputs over the
        calibration tokens, H = X^T X / tokens, fp32 (channels, channels). Raises `PermpruneError` if H cannot be used.
        """

    def scale_of(self, weight: Float[Tensor, "rows channels"], moments: Float[Tensor, "channels channels"]) -> Scale:
        """Return `scale` as a `Scale`."""
        scale = self.scale(weight, moments)
        return scale if isinstance(scale, Scale) else Scale(scale[None])

    def score(
        self, weight: Float[Tensor, "rows channels"], moments: Float[Tensor, "channels channels"]
    ) -> Float[Tensor, "rows channels"]:
        """Return the score of each weight, fp32 (rows, channels); the arguments are those of `scale`."""
        return self.scale_of(weight, moments).score(weight)
