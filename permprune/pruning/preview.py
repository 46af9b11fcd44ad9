"""A sample of weights before and after reordering, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from permprune.checkpoints.record import PrunedLayer
from permprune.pruning.masked import MaskedLayers

ROWS, CHANNELS = 12, 32
"""The largest numbers of rows and channels of a sample."""


def sample(network: MaskedLayers, measures: Sequence[PrunedLayer]) -> dict[str, Any]:
    """Return a few weights of the layer whose kept saliency the order raises most.

    `measures` are the measures of the network's layers, with the current orders and in natural order. "natural" and
    "permuted" are tables of (rows, channels) in natural and in stored order: "score" is the squared score in whole
    percents of a high one, and "kept" is 1 if the saliency's mask keeps the weight, else 0. The masks of a weight
    update, which may differ, are not shown.
    """
    layer = max(measures, key=lambda layer: layer.kept - layer.kept_none)
    name = layer.name
    scores, pattern = network.scores[name], network.patterns[name]
    stored = network.stored_columns()[name].to(scores.device)
    count = min(CHANNELS, scores.shape[1]) // pattern.m * pattern.m or pattern.m
    energy = scores[torch.linspace(0, len(scores) - 1, min(ROWS, len(scores))).long()].double().square()
    high = energy.quantile(0.98).clamp_min(1e-30)

    def part(columns: Tensor) -> dict[str, list[list[int]]]:
        shown = energy[:, columns[:count]]
        percents = (100 * shown / high).clamp_max(100).round().int().tolist()
        return {"score": percents, "kept": pattern.mask(shown).int().tolist()}

    natural = torch.arange(scores.shape[1], device=scores.device)
    kept = {"kept_none": layer.kept_none, "kept": layer.kept}
    return {"layer": name, "m": pattern.m, **kept, "natural": part(natural), "permuted": part(stored)}
