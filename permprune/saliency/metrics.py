"""Saliency metrics, which score the importance of each weight: their interface, and those that are given by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from permprune.options import NonNegative, require_fields
from permprune.registry import method_of
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch
    from jaxtyping import Float
    from torch import Tensor

    from permprune.calibration.moments import inverse_factor, root_mean_square
    from permprune.system import sharding

TINY = 1e-12
"""The least sum of a row or column, so that one of zeros scores zero instead of NaN."""


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


@dataclass(frozen=True)
class Magnitude(Saliency):
    """|w|, independent of the inputs (Han et al. 2015, arXiv 1506.02626)."""

    name: ClassVar[str] = "magnitude"

    def scale(
        self, weight: Float[Tensor, "rows channels"], moments: Float[Tensor, "channels channels"]
    ) -> Float[Tensor, " channels"]:
        return torch.ones_like(moments.diagonal())


@dataclass(frozen=True)
class Wanda(Saliency):
    """|w| * ||x_j||: weight times the norm of its input channel (Sun et al. 2024, arXiv 2306.11695, section 3)."""

    name: ClassVar[str] = "wanda"

    def scale(
        self, weight: Float[Tensor, "rows channels"], moments: Float[Tensor, "channels channels"]
    ) -> Float[Tensor, " channels"]:
        return root_mean_square(moments)


@dataclass(frozen=True)
class OBS(Saliency):
    """|w| / sqrt([(H + damping * mean diagonal * I)^-1]_jj), the score of SparseGPT (Frantar & Alistarh 2023).

    The squared score is the output error that remains after a weight is removed and the others of its row are updated
    to compensate (arXiv 2301.00774, section 3). SparseGPT uses the H of the channels that are not yet processed, which
    become fewer at each step; this metric uses the H of all channels. `damping` is the share of the mean diagonal that
    is added to the diagonal of H. The weights of a channel that is always zero score 0.
    """

    name: ClassVar[str] = "obs"
    damping: NonNegative = 0.01

    def scale(
        self, weight: Float[Tensor, "rows channels"], moments: Float[Tensor, "channels channels"]
    ) -> Float[Tensor, " channels"]:
        deviation: Tensor = torch.linalg.vector_norm(inverse_factor(moments, self.damping), dim=0)
        return (moments.diagonal() > 0) / deviation


@dataclass(frozen=True)
class RIA(Saliency):
    """(|w| / column sum + |w| / row sum) * ||x_j||^power (Zhang et al. 2024, "Plug-and-Play", section 3.1).

    A `power` below 1 reduces the influence of the activations; the paper uses 0.5.
    """

    name: ClassVar[str] = "ria"
    power: NonNegative = 0.5

    def scale(self, weight: Float[Tensor, "rows channels"], moments: Float[Tensor, "channels channels"]) -> Scale:
        size, norm = weight.float().abs(), root_mean_square(moments) ** self.power
        sums = [size.sum(dim) for dim in (0, 1)]
        sharding.add_(sums[0])
        columns, rows = (1 / total.clamp_min(TINY) for total in sums)
        return Scale(torch.stack([columns * norm, norm]), torch.stack([torch.ones_like(rows), rows], 1))


SALIENCIES: dict[str, type[Saliency]] = {metric.name: metric for metric in (Magnitude, Wanda, RIA, OBS)}


def saliency(given: str | Saliency) -> Saliency:
    """Return the saliency of a name such as "wanda" or "ria:power=1"; an object is returned as it is (`method_of`)."""
    return method_of(given, Saliency, SALIENCIES)  # type: ignore[type-abstract]
