"""A few weights before and after their reordering, for the eye."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from permprune.checkpoints.record import PrunedLayer
from permprune.pruning.masked import MaskedLayers

ROWS, CHANNELS = 12, 32
"""At most so many are shown."""


def sample(network: MaskedLayers, measures: Sequence[PrunedLayer]) -> dict[str, Any]:
    """A few weights of the layer in which the order raises the kept saliency most.

    `measures` are the network's, beside those in natural order. "natural" and "permuted" hold the scores as whole
    percents of a high one ("score") and which the saliency's mask keeps ("kept", 0 or 1), rows of channels in natural
    and in stored order; an update of the weights, which may choose other masks, is not seen.
    """
    layer = max(measures, key=lambda layer: layer.kept - layer.kept_none)
    name = layer.name
    scores, pattern = network.scores[name], network.patterns[name]
    stored = network.stored_columns()[name].to(scores.device)
    count = min(CHANNELS, scores.shape[1]) // pattern.m * pattern.m or pattern.m
    energy = scores[torch.linspace(0, len(scores) - 1, min(ROWS, len(scores))).long()].square()
    high = energy.quantile(0.98).clamp_min(1e-30)

    def part(columns: Tensor) -> dict[str, list[list[int]]]:
        shown = energy[:, columns[:count]]
        percents = (100 * shown / high).clamp_max(100).round().int().tolist()
        return {"score": percents, "kept": pattern.mask(shown).int().tolist()}

    natural = torch.arange(scores.shape[1], device=scores.device)
    kept = {"kept_none": layer.kept_none, "kept": layer.kept}
    return {"layer": name, "m": pattern.m, **kept, "natural": part(natural), "permuted": part(stored)}
