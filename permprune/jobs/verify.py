"""The job of `permprune verify`: check the sparsity pattern and the outputs of a pruned model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers import PreTrainedModel

from permprune.checkpoints.io import load
from permprune.checkpoints.origin import origin_of, recorded_patterns, require_patterns
from permprune.checkpoints.probe import TOLERANCE, check_outputs
from permprune.checkpoints.record import PACKED
from permprune.errors import PermpruneError
from permprune.inference.rounding import check_rounding
from permprune.models.layers import DenseWeights, dense_weights
from permprune.pruning.folder import require_probe
from permprune.system.failures import failures_reported
from permprune.system.progress import CHECK, READ, stage, stages


@dataclasses.dataclass(frozen=True)
class Verified:
    """The result of `verify`.

    `layers` is the number of layers whose stored weights satisfy their pattern, and `dense` describes the weights of
    the blocks that are not pruned. `difference` is the largest absolute difference between the model's outputs on
    random inputs and those of the masked model in fp32, before its channels were reordered and its weights packed.
    More than `limit` is refused, and `largest` is the largest absolute output. Of a packed model, `stored` is the type
    of its weights, and `rounding` what rounding at random changes (`rounding_change`).
    """

    layers: int
    difference: float
    dense: DenseWeights
    limit: float
    largest: float
    stored: str | None = None
    rounding: float | None = None


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
    if (record := origin.record) is None:
        raise PermpruneError("permprune did not prune this model: give one returned by prune or load, or a folder")
    patterns = recorded_patterns(loaded, record.layers)
    require_patterns(loaded, patterns)
    what = "this model" if loaded is model else str(model)
    probe, packed, dense = require_probe(origin), record.extra.get(PACKED), record.dense
    if dense is None:  # older releases did not record it
        excluded = record.settings.get("exclude")
        globs = map(str, excluded) if isinstance(excluded, list) else ()
        dense = dense_weights(loaded, [layer.name for layer in record.layers], globs)
    verified = Verified(
        layers=len(patterns),
        difference=check_outputs(loaded, probe, what),
        dense=dense,
        limit=probe.tolerance,
        largest=probe.largest,
    )
    if packed is None:
        return verified
    before = packed.get(TOLERANCE, probe.tolerance)  # which earlier releases did not record
    rounding = check_rounding(loaded, probe, verified.difference, before=before, what=what)
    return dataclasses.replace(verified, stored=packed["dtype"], rounding=rounding)
