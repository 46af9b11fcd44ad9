"""The speed of a pruned model beside the dense one, measured in a few seconds at the end of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from permprune.checkpoints.io import load, read_model
from permprune.checkpoints.offload import read_size
from permprune.checkpoints.record import PACKED, Record, SizeAndSpeed, read_record
from permprune.config import PruneConfig
from permprune.errors import first_line
from permprune.evaluation.speed import ImageSize, cells, measure_speed
from permprune.models.forward import is_causal_lm
from permprune.models.modality import kind_of
from permprune.pruning.folder import write_record
from permprune.system.device import best_device, dtype_named, fast_dtype
from permprune.system.progress import log

TYPES = ("fp32", "bf16")
"""The data types in which dense models are measured."""

FEW, STEPS = 4, 16
"""Generated tokens: a few to find the faster data type, then those that count."""

TURNS = 2
"""How often each speed that counts is measured; the highest is reported."""

READ_BY = {"images": "images", "speech": "sounds"}
"""What kinds of models read that read no texts."""

INPUTS, TOKENS = 8, 128
"""Inputs of a batch, and tokens of a text, for models that do not generate."""


def add_speeds(folder: Path, dense: str, config: PruneConfig) -> Record:
    """Measure the dense model and the one in a folder, one after the other, and write their speeds into its record.

    `dense` is the name of the dense model of a run with this config. It runs in the data type in which it is faster,
    and so does the pruned model, unless it is packed. Returns the record. A model that cannot be measured leaves it as
    it was, with a warning.
    """
    record, trusted = read_record(folder), config.trust_remote_code
    if record.showcase is None:
        return record
    log.info("measuring the speed of the dense and of the pruned model")
    try:
        model, _, _ = read_model(dense, task=config.task, trust_remote_code=trusted)
        fastest = _fastest_type(model)
        sides, size = dict(record.showcase.sides), read_size(dense, model, trust_remote_code=trusted)
        sides["dense"] = _measured(nn.Module.to(model, dtype_named(fastest)), sides["dense"], fastest, size)
        unit = "tokens/s" if is_causal_lm(model) else f"{READ_BY.get(kind_of(model), 'texts')}/s"
        del model
        pruned = nn.Module.to(load(folder, trust_remote_code=trusted), best_device())
        if PACKED in record.extra:
            stored, run = record.extra[PACKED]["dtype"], _fastest_type(pruned)
            fastest = f"{stored}, packed" if stored == run else f"{stored}, packed, run in {run}"
        else:
            run = fastest
        nn.Module.to(pruned, dtype_named(run))
        sides["pruned"] = _measured(pruned, sides["pruned"], fastest, size)
    except Exception as error:  # a model's own code can raise any type, and what was written is complete
        log.warning("the speed was not measured: %s", first_line(error))
        return record
    device = "GPU" if best_device().type == "cuda" else "CPU"
    shown = dataclasses.replace(record.showcase, sides=sides, unit=unit, threads=torch.get_num_threads(), device=device)
    record = dataclasses.replace(record, showcase=shown)
    write_record(record, folder)
    return record


def _fastest_type(model: PreTrainedModel) -> str:
    """The data type in which a model is fastest, of `TYPES`; the model is left in one of them.

    Of models that do not generate, where products are the limit, it is known without a measurement.
    """
    if not is_causal_lm(model):
        return "bf16" if fast_dtype(best_device()) == torch.bfloat16 else "fp32"
    rates = {name: _rate(nn.Module.to(model, dtype_named(name)), FEW) for name in TYPES}
    return max(rates, key=rates.__getitem__)


def _measured(model: PreTrainedModel, side: SizeAndSpeed, dtype: str, size: ImageSize) -> SizeAndSpeed:
    """Return a side with the speed of its model, which is in this data type, for images of this size."""
    return dataclasses.replace(side, speed=max(_rate(model, STEPS, size) for _ in range(TURNS)), dtype=dtype)


def _rate(model: PreTrainedModel, steps: int, size: ImageSize = None) -> float:
    """The tokens that a language model generates in a second, one at a time, or the inputs that another reads."""
    generates = is_causal_lm(model)
    ((batch, context),) = cells(model, [1 if generates else INPUTS], [steps if generates else TOKENS])
    return measure_speed(model, batch=batch, context=context, steps=steps, size=size).rate
