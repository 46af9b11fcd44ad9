"""Prove a folder that permprune wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from permprune.checkpoints.io import load
from permprune.checkpoints.origin import origin_of
from permprune.checkpoints.patterns import recorded_patterns, require_patterns
from permprune.checkpoints.probe import check_outputs
from permprune.checkpoints.record import Record
from permprune.models.layers import DenseWeights, dense_weights
from permprune.pruning.folder import require_probe
from permprune.system.out_of_memory import memory_reported


@memory_reported()
def verify_folder(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Prove a folder that permprune wrote: N:M in stored order, it reloads, and it says what the masked model said.

    Returns "layers", how many were checked, "difference", the largest of the outputs, and "dense", what stays dense
    inside the blocks (`DenseWeights`). `trust_remote_code` is as that of `read_model`. Raises `PermpruneError` naming
    the first thing that does not hold.
    """
    model = load(folder, trust_remote_code=trust_remote_code)
    origin = origin_of(model)
    assert origin.record is not None
    patterns = recorded_patterns(model, origin.record.layers)
    require_patterns(model, patterns)
    difference = check_outputs(model, require_probe(origin), str(folder), stored=origin.dtype)
    return {
        "layers": len(patterns),
        "difference": difference,
        "dense": origin.record.dense or _dense(model, origin.record),
    }


def _dense(model: PreTrainedModel, record: Record) -> DenseWeights:
    """What an older release did not record."""
    excluded = record.settings.get("exclude")
    globs = map(str, excluded) if isinstance(excluded, list) else ()
    return dense_weights(model, [layer.name for layer in record.layers], globs)
