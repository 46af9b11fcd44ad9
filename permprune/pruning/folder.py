"""Writing the folder of a pruned model: weights, processor, record, probe and report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from permprune.checkpoints.damage import weight_digests
from permprune.checkpoints.io import WRITTEN, load_written, write_weights
from permprune.checkpoints.origin import Origin, origin_of
from permprune.checkpoints.patterns import recorded_patterns, require_patterns
from permprune.checkpoints.probe import PROBE, Probe, check_outputs, make_probe
from permprune.checkpoints.record import RECORD, Record
from permprune.errors import FinalError, PermpruneError
from permprune.models.forward import computed_in, stored_as
from permprune.models.layers import is_packed
from permprune.models.processors import Processor
from permprune.report.card import write_card
from permprune.report.run import REPORT, write_report
from permprune.system.files import atomic_folder, write_json


def save(model: PreTrainedModel, folder: str | Path, processor: Processor | None = None) -> None:
    """Save a model that permprune pruned or loaded, in either mode, for `load` and `verify`.

    The weights may have been trained since then, if every pruned layer still holds its pattern; the outputs that are
    stored for verification are those of the current weights. `folder` must not exist; it is created atomically. Raises
    `PermpruneError` for a model that permprune did not prune or that was packed, and if a layer no longer holds its
    pattern.
    """
    record = origin_of(model).record
    if record is None:
        raise PermpruneError("permprune did not prune this model: write it with its own save_pretrained")
    if is_packed(model):
        raise PermpruneError("this model is packed: write it with its own save_pretrained, or unpack it first")
    with atomic_folder(Path(folder)) as filled:
        write_model(model, processor, filled)


def write_model(model: PreTrainedModel, processor: Processor | None, folder: Path, **changes: Any) -> None:
    """Write a model to a folder, in the type in which its checkpoint stores weights.

    A model that permprune pruned is written with its record, probe and report; `changes` replace fields of the record.
    Raises `PermpruneError` if a pruned layer does not hold its pattern.
    """
    origin = origin_of(model)
    weights = partial(write_weights, model, processor, origin.dtype)
    if origin.record is None:
        weights(folder)
        return
    require_patterns(model, recorded_patterns(model, origin.record.layers))
    record = dataclasses.replace(origin.record, **changes)
    inputs = require_probe(origin).inputs
    with stored_as(model, origin.dtype), computed_in(model, torch.float32):
        probe = make_probe(model, inputs)
    write_pruned(record, probe, weights, folder, load=partial(load_written, model))


def write_pruned(
    record: Record,
    probe: Probe,
    weights: Callable[[Path], object],
    folder: Path,
    *,
    load: Callable[[Path], PreTrainedModel],
) -> None:
    """Write a pruned model to a folder; `weights(folder)` writes its weights and processor.

    The record gets the digests of the written weights. Then `load(folder)` loads the model, as `load_written`. Raises
    `FinalError` if its outputs are not those of the probe.
    """
    weights(folder)
    probe.write(folder)
    write_record(dataclasses.replace(record, digests=weight_digests(folder)), folder)
    try:
        check_outputs(
            load(folder), probe, f"{WRITTEN}, loaded again,", "it is discarded; report it, or try --mode gather"
        )
    except PermpruneError as error:
        raise FinalError(str(error)) from error


def write_record(record: Record, folder: Path) -> None:
    """Write the record of a folder that has its weights and its config, and the pages that show it.

    Raises `PermpruneError` if one of them cannot be written.
    """
    values = record.to_json()
    write_json(folder / RECORD, values)
    write_report(values, folder / REPORT)
    write_card(values, folder)


def require_probe(origin: Origin) -> Probe:
    """Return the probe of a pruned model. Raises `PermpruneError` if its folder does not have one."""
    if origin.probe is None:
        raise PermpruneError(f"{origin.name} lacks {PROBE}: copy the whole folder, or prune the model again")
    return origin.probe
