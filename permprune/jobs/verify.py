"""The job of `permprune verify`: check the sparsity pattern and the outputs of a pruned model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers import PreTrainedModel

from permprune.checkpoints.io import load
from permprune.checkpoints.origin import origin_of, recorded_patterns, require_patterns
from permprune.checkpoints.probe import check_outputs
from permprune.checkpoints.record import Record
from permprune.errors import PermpruneError
from permprune.models.layers import DenseWeights, dense_weights
from permprune.pruning.folder import require_probe
from permprune.system.failures import failures_reported
from permprune.system.progress import stage, stages
from permprune.system.stages import CHECK, READ


@dataclasses.dataclass(frozen=True)
class Verified:
    """The result of `verify`.

    `layers` is the number of layers whose stored weights satisfy their pattern, and `dense` describes the weights of
    the blocks that are not pruned. `difference` is the largest absolute difference between the model's outputs and
    those of the masked model before its channels were reordered.
    """

    layers: int
    difference: float
    dense: DenseWeights


@failures_reported()
@stages(READ, CHECK)
def verify(model: str | Path | PreTrainedModel, *, trust_remote_code: bool = False) -> Verified:
    """Check that the stored weights of every layer are N:M sparse and that the outputs are those of the masked model.

    `model` is a folder that permprune wrote, which is loaded, or a model in memory from `prune` or `load`.
    `trust_remote_code` is as in `read_model`. Raises `PermpruneError` for the first check that fails.
    """
    loaded = model if isinstance(model, PreTrainedModel) else load(model, trust_remote_code=trust_remote_code)
    stage(CHECK)
    origin = origin_of(loaded)
    if origin.record is None:
        raise PermpruneError("permprune did not prune this model: give one returned by prune or load, or a folder")
    patterns = recorded_patterns(loaded, origin.record.layers)
    require_patterns(loaded, patterns)
    what = "this model" if loaded is model else str(model)
    difference = check_outputs(loaded, require_probe(origin), what)
    return Verified(len(patterns), difference, origin.record.dense or _dense(loaded, origin.record))


def _dense(model: PreTrainedModel, record: Record) -> DenseWeights:
    """Compute the description of the dense weights, which older releases did not record."""
    excluded = record.settings.get("exclude")
    globs = map(str, excluded) if isinstance(excluded, list) else ()
    return dense_weights(model, [layer.name for layer in record.layers], globs)
