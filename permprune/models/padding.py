"""The padded positions of a batch."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from torch import Tensor, nn

from permprune.models.experts import Routed


@dataclass(frozen=True)
class Padding:
    """The padding of one batch.

    `masks` are bool tensors (batch, length), False at padding: one per sequence that the model reads, e.g. one for the
    encoder and one for the decoder. Their shapes differ, so the shape of an activation tells to which sequence it
    belongs. Without masks, nothing is padding. `readers` are the modules that read these sequences; None for all. The
    vision encoder of a vision-language model is not one of them: its activations may have the shape of the text.
    """

    masks: tuple[Tensor, ...] = ()
    readers: Set[nn.Module] | None = None

    @classmethod
    def of(cls, *masks: Tensor | None, readers: Set[nn.Module] | None = None) -> Padding:
        """Create the padding from masks of any dtype that are 0 at padding; None entries are ignored."""
        return cls(tuple(mask.bool() for mask in masks if mask is not None), readers)

    def mask_of(self, x: Tensor, routed: Routed | None = None, module: nn.Module | None = None) -> Tensor | None:
        """The mask that belongs to activations x, (batch, length, channels) or (batch * length, channels).

        It has the shape of x without the channels and is False at padding. None if x has no padding. If x are the
        inputs or outputs of an expert, (rows, channels), `routed` tells of which tokens. `module` is the module that
        reads or computes x; None if x are outputs of the model.
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
