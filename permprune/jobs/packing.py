"""The jobs of `permprune pack` and `permprune unpack`: convert a pruned checkpoint to packed weights, and back."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from permprune.checkpoints.io import PROCESSOR, load, load_written, loading, write_beside, write_weights
from permprune.checkpoints.origin import linear_layers, origin_of
from permprune.checkpoints.probe import TOLERANCE, Probe, check_outputs, output_difference
from permprune.checkpoints.record import PACKED, read_record
from permprune.config import PruneConfig
from permprune.errors import PermpruneError
from permprune.evaluation.size import stored_bytes, weight_bytes
from permprune.inference.pack import pack, packed_type, unpack
from permprune.inference.rounding import check_rounding
from permprune.models.layers import merged
from permprune.models.processors import Processor, read_processor
from permprune.pattern import DENSE
from permprune.plan import calibration_examples
from permprune.pruning.folder import require_probe, write_pruned
from permprune.system.failures import failures_reported
from permprune.system.files import atomic_folder, require_new, require_space
from permprune.system.progress import PACK, READ, WRITE, log, stage, stages

SLACK = 2.0
"""The tolerance of packed weights, relative to the difference that was measured when they were packed."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Size in bytes before (`dense`) and after (`packed`) packing."""

    dense: int
    packed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """The result of packing a folder.

    `weights` are the sizes of all weights, `layers` those of the pruned layers, and `left_dense` the names of the
    layers that were not packed, as `merged` shows them. `difference` is the largest absolute difference between the
    packed model's outputs on the folder's probe and those of the masked model, of which the unpacked model had `before`
    already. `rounding` is what rounding at random changes (`rounding_change`), `largest` the largest absolute output.
    """

    weights: Sizes
    layers: Sizes
    left_dense: list[str]
    difference: float
    before: float
    rounding: float
    largest: float

    def warn(self) -> None:
        """Log a warning that names the layers that were not packed, if there are any."""
        if self.left_dense:
            names = ", ".join(self.left_dense)
            log.warning("of a type that has no packed form, and so written with their zeros: %s", names)


@failures_reported()
@stages(READ, PACK, WRITE)
def pack_folder(
    folder: str | Path,
    out: str | Path,
    *,
    dtype: str = "bf16",
    head: str | None = None,
    calibration: PruneConfig | None = None,
    trust_remote_code: bool = False,
) -> Packed:
    """Write the pruned checkpoint in `folder` with packed weights to the folder `out`, which Transformers can load.

    `dtype` and `head` are as in `permprune.pack`, and `trust_remote_code` is as in `read_model`. With `calibration`
    values of int4 are solved on its data, as many windows as it measures. The gathers of the checkpoint become part of
    the packed layers. Raises `PermpruneError`.
    """
    folder, out = Path(folder), Path(out)
    require_new(out)
    record = read_record(folder)
    if PACKED in record.extra:
        raise PermpruneError(f"{folder} is packed already: unpack it first, or pack the folder that it was made from")
    model, processor, probe, earlier = _read(folder, trust_remote_code)
    require_space(out, weight_bytes(model))
    stage(PACK)
    examples = None
    if calibration is not None:
        examples = calibration_examples(model, processor, calibration.replace(samples=calibration.measured))
    patterns = {row.name: row.pattern for row in record.layers}
    kept = dict.fromkeys(record.mix.dense if record.mix else (), DENSE)
    before = _sizes(model, set(patterns))
    left = pack(model, patterns | kept, dtype=dtype, head=head, examples=examples)
    after = _sizes(model, set(patterns))
    packed = f"{folder}, packed as {dtype},"
    difference = output_difference(model, probe, packed)
    rounding = check_rounding(model, probe, difference, before=probe.tolerance, what=packed)
    stored = {"gathers": record.to_json()["gathers"], "dtype": dtype, "head": head, TOLERANCE: probe.tolerance}
    measured = dataclasses.replace(probe, tolerance=max(probe.tolerance, SLACK * difference))
    shown, known = record.showcase and record.showcase.resized(after[0]), record.measured
    if head is None and packed_type(dtype) == model.dtype:  # no value changes
        known = known and dataclasses.replace(known, packed=dtype)
    extra = {**record.extra, PACKED: stored}
    record = dataclasses.replace(record, gathers=[], bench=None, showcase=shown, measured=known, extra=extra)

    def weights(written: Path) -> None:
        model.save_pretrained(written)
        write_beside(model, processor, written)

    stage(WRITE)
    with atomic_folder(out) as written:
        write_pruned(record, measured, weights, written, load=partial(load_written, model))
    return Packed(
        weights=Sizes(before[0], after[0]),
        layers=Sizes(before[1], after[1]),
        left_dense=merged(left),
        difference=difference,
        before=earlier,
        rounding=rounding,
        largest=probe.largest,
    )


@failures_reported()
@stages(READ, "unpack", WRITE)
def unpack_folder(folder: str | Path, out: str | Path, *, trust_remote_code: bool = False) -> None:
    """Write the packed checkpoint in `folder` to the folder `out` as an unpacked one, with its zeros and gathers.

    `trust_remote_code` is as in `read_model`. Raises `PermpruneError`, for example if `folder` is not packed.
    """
    folder, out = Path(folder), Path(out)
    require_new(out)
    record = read_record(folder)
    if PACKED not in record.extra:
        raise PermpruneError(f"{folder} is not packed: give a folder with packed weights")
    model, processor, probe, _ = _read(folder, trust_remote_code)
    stage("unpack")
    unpack(model)
    difference = check_outputs(model, probe, f"the unpacked {folder}")
    tolerance = max(record.extra[PACKED].get(TOLERANCE, probe.tolerance), SLACK * difference)
    size = weight_bytes(model)
    require_space(out, size)
    stage(WRITE)
    with atomic_folder(out) as written:
        write_pruned(
            record.unpacked(size),
            dataclasses.replace(probe, tolerance=tolerance),
            lambda made: write_weights(model, processor, model.dtype, made),
            written,
            load=partial(load_written, model),
        )


def _read(folder: Path, trust_remote_code: bool) -> tuple[PreTrainedModel, Processor | None, Probe, float]:
    """Load the model in the data type that it is stored in, its processor (None if the folder has none), and its probe.

    The number is how far its outputs are from those of the probe. Raises `PermpruneError` if that is too far.
    """
    with loading(str(folder), folder, PROCESSOR):
        processor = read_processor(folder, trust_remote_code)
    model = load(folder, trust_remote_code=trust_remote_code)
    probe = require_probe(origin_of(model))
    return model, processor, probe, check_outputs(model, probe, str(folder))


def _sizes(model: PreTrainedModel, names: set[str]) -> tuple[int, int]:
    """Return the bytes of all tensors of a model, tied ones counted once, and the bytes of the named layers."""
    layers = [layer for name, layer in linear_layers(model).items() if name in names]
    tensors = [layer.weight for layer in layers if layer.expert is not None]
    for layer in layers:
        if layer.expert is None:
            tensors += layer.module.state_dict().values()
    return stored_bytes(model), sum(tensor.nbytes for tensor in tensors)
