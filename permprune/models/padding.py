"""Which positions of a batch are padding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """The padding of one batch.

    `masks` are bool (batch, length), True where a position is real, one for each sequence that a model reads: that of a
    decoder beside that of its encoder. Their shapes differ, so that a tensor's own shape tells which sequence it runs
    along. Without masks nothing is padding.
    """

    masks: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, *masks: Tensor | None) -> Padding:
        """The padding for masks of any type that are 0 at padding; None stands for no mask."""
        return cls(tuple(mask.bool() for mask in masks if mask is not None))

    def mask_of(self, x: Tensor) -> Tensor | None:
        """Where activations x, (batch, length, channels) or (batch * length, channels), are real; None: everywhere."""
        for mask in self.masks:
            if x.shape[:-1] in (mask.shape, (mask.numel(),)):
                return mask.reshape(x.shape[:-1])
        return None

    def real(self, x: Tensor) -> Tensor:
        """The activations that are not padding, (positions, channels); x itself where all are real."""
        mask = self.mask_of(x)
        return x if mask is None else x[mask]
