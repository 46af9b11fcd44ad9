"""What is known of a model: where it comes from and how it was pruned, and the N:M patterns of its layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from permprune.checkpoints.gathers import Gather, attach_gathers
from permprune.checkpoints.probe import Probe, read_probe
from permprune.checkpoints.record import RECORD, PrunedLayer, Record, read_record
from permprune.checkpoints.schema import Malformed
from permprune.errors import PermpruneError
from permprune.kernels.product.module import PackedLinear
from permprune.models.layers import Layer, is_packed, linears_of
from permprune.pattern import Pattern, tightest
from permprune.system.progress import log

ATTRIBUTE = "_permprune_origin"

Patterns = dict[str, Pattern]
"""Patterns by the name of the layer."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a model comes from: its name, the dtype of its stored weights, and how it was pruned.

    `record` is None unless permprune pruned the model. `probe` is what a saved copy of a pruned model is checked by;
    None if there is none.
    """

    name: str
    dtype: torch.dtype
    record: Record | None = None
    probe: Probe | None = None

    @property
    def gathers(self) -> list[Gather]:
        """The gathers in the record; empty if there is no record."""
        return self.record.gathers if self.record else []


def origin_of(model: PreTrainedModel) -> Origin:
    """The `Origin` of a model; for a model that permprune has not loaded, one made from its config and its dtype.

    If plain Transformers has loaded it from a folder with a record, that is read.
    """
    known: Origin | None = vars(model).get(ATTRIBUTE)
    if known is None:
        name = model.config.name_or_path or type(model).__name__
        known = Origin(name, model.dtype, *_recorded(model, Path(name)))
        if known.record:
            set_origin(model, known)
    return known


def _recorded(model: PreTrainedModel, folder: Path) -> tuple[Record | None, Probe | None]:
    """Return the record and the probe of the folder that a model was read from, if it has them."""
    if is_packed(model) or not (folder / RECORD).is_file():
        return None, None
    record = read_record(folder)
    if not linear_layers(model).keys() >= {layer.name for layer in record.layers}:
        log.warning("%s is not used: it names layers that a %s does not have", folder / RECORD, type(model).__name__)
        return None, None
    return record, read_probe(folder, model.dtype)


def set_origin(model: PreTrainedModel, origin: Origin) -> None:
    """Attach an `Origin` to a model; copies and pickles of the model keep it."""
    vars(model)[ATTRIBUTE] = origin


def carry_over(model: PreTrainedModel, whole: PreTrainedModel, rename: Callable[[str], str]) -> None:
    """Transfer the gathers and the `Origin` of `model` to `whole`, which shares its weights under other names.

    `rename` maps a module name of `model` to the name of that module in `whole`.
    """
    origin = origin_of(model)
    if record := origin.record:
        origin = dataclasses.replace(origin, record=_renamed(record, rename))
        attach_gathers(whole, origin.gathers)
    set_origin(whole, origin)


def _renamed(record: Record, rename: Callable[[str], str]) -> Record:
    """The record with `rename` applied to the names of modules, and of spaces and sites, which begin with one."""
    sample, dense, mix = record.sample, record.dense, record.mix
    return dataclasses.replace(
        record,
        layers=[dataclasses.replace(layer, name=rename(layer.name)) for layer in record.layers],
        dense=None if dense is None else dataclasses.replace(dense, layers=[*map(rename, dense.layers)]),
        permutations={rename(space): table for space, table in record.permutations.items()},
        gathers=[
            dataclasses.replace(
                gather,
                site=rename(gather.site),
                output=rename(gather.output) if gather.output else "",
                inputs=[rename(name) for name in gather.inputs],
            )
            for gather in record.gathers
        ],
        sample=None if sample is None else dataclasses.replace(sample, layer=rename(sample.layer)),
        reordered={output: [*map(rename, spaces)] for output, spaces in record.reordered.items()},
        mix=mix and dataclasses.replace(mix, layers={rename(name): pattern for name, pattern in mix.layers.items()}),
    )


def recorded_patterns(model: nn.Module, layers: Iterable[PrunedLayer]) -> Patterns:
    """The pattern of each layer in a record. Raises `Malformed` if the model has no such layer or M does not fit it."""
    linears = linear_layers(model)
    for row in layers:
        if row.name not in linears or linears[row.name].transposed != row.transposed:
            raise Malformed(f"the model has no such layer as {row.name!r}")
        if not Pattern.parse(row.pattern).divides(width := linears[row.name].shape[1]):
            raise Malformed(f"{row.name} has rows of {width} weights, which {row.pattern} does not fit")
    return {row.name: Pattern.parse(row.pattern) for row in layers}


def held_patterns(model: nn.Module) -> Patterns:
    """The sparsest pattern (see `tightest`) that each linear layer's weights satisfy; dense layers are left out."""
    patterns = {name: tightest(layer.weight) for name, layer in linear_layers(model).items()}
    return {name: pattern for name, pattern in patterns.items() if pattern}


def require_patterns(model: nn.Module, patterns: Patterns) -> None:
    """Raise `PermpruneError` unless the weights of every layer, as stored, satisfy its pattern."""
    linears = linear_layers(model)
    for name, pattern in patterns.items():
        if not pattern.holds(linears[name].weight):
            raise PermpruneError(f"{name} is not {pattern} in stored order: prune the model again")


def linear_layers(model: nn.Module) -> dict[str, Layer]:
    """All linear layers of a model by name, whether pruned, packed or dense."""
    linears = {}
    for name, module in model.named_modules():
        layers = linears_of(name, module)
        if isinstance(module, PackedLinear):
            layers = [Layer(name, owner=module, module=module, transposed=module.transposed)]
        linears.update({layer.name: layer for layer in layers})
    return linears
