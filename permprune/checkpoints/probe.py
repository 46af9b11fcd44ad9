"""What a pruned model's folder is checked by: digests of its weights, and a probe of what the model computes.

The probe has random inputs and the masked model's outputs for them, computed in fp32 before the permutations are folded
into the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from permprune.checkpoints.record import ADVICE
from permprune.errors import PermpruneError, first_line
from permprune.models.dummy_inputs import random_like
from permprune.models.forward import argument_names, forward_arguments, main_outputs
from permprune.models.hooks import attached
from permprune.models.layers import is_packed
from permprune.models.narrow_weights import in_fp32
from permprune.system.device import compute_device
from permprune.system.digests import digest_of

PROBE = "probe.safetensors"

OUTPUTS, TOLERANCE = "outputs", "tolerance"
"""Names of the outputs and of the tolerance in the file; the other tensors are arguments of the model's forward."""

OLD_OUTPUTS = "answer"
"""The name of the outputs in files of earlier releases, whose inputs are calibration data, and without a tolerance."""

POSITIONS = 4
"""Number of positions of a sequence whose outputs are compared."""

MARGIN = 2**-9
"""The share of the change by activations in bf16 that fp32 may differ by: 128 times the ratio of their roundings."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """Inputs of a model, by the names of its forward's arguments, and its outputs for them.

    `outputs` are fp32 (rows, ...): the model's first main output (see `main_outputs`), and of a sequence those at
    evenly spaced positions. `tolerance` is the largest absolute difference that rounding explains.
    """

    inputs: Mapping[str, Tensor]
    outputs: Tensor
    tolerance: float

    @property
    def largest(self) -> float:
        """The largest absolute output, of those that are finite."""
        return largest_difference(self.outputs, self.outputs)[1]

    def outputs_of(self, model: PreTrainedModel) -> Tensor:
        """Return a model's outputs for the inputs, at as many positions as `outputs` has."""
        rows = len(next(iter(self.inputs.values())))
        return probe_outputs(model, self.inputs, max(1, len(self.outputs) // max(1, rows)))

    def write(self, folder: Path) -> None:
        """Write the file of the probe into a folder."""
        tolerance = torch.tensor(self.tolerance, dtype=torch.float64)
        save_file({**self.inputs, OUTPUTS: self.outputs, TOLERANCE: tolerance}, folder / PROBE)


def make_probe(model: PreTrainedModel, like: Mapping[str, Tensor]) -> Probe:
    """Create a probe with the current outputs of a model that computes in fp32.

    Its inputs are random, with the shapes of `like` (see `random_like`). The tolerance is a share (`MARGIN`) of what
    rounding the outputs of all modules to bf16 changes in finite outputs.
    """
    inputs = {name: tensor.cpu().contiguous() for name, tensor in random_like(model, like).items()}
    outputs = probe_outputs(model, inputs)
    with _rounded(model):
        rounded = probe_outputs(model, inputs)
    rounding, scale = largest_difference(
        outputs, torch.where(rounded.isfinite() & outputs.isfinite(), rounded, outputs)
    )
    return Probe(inputs, outputs, max(MARGIN * rounding, 1e-6 * scale))


@torch.inference_mode()
def probe_outputs(model: PreTrainedModel, inputs: Mapping[str, Tensor], positions: int = POSITIONS) -> Tensor:
    """Return the model's first main output at so many positions, the last one among them: fp32 (rows, ...).

    Rows are examples, or positions of examples if the output has more than two dimensions.
    """
    device = compute_device(model)
    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
    output: Tensor = main_outputs(model(**forward_arguments(model, moved)))[0]
    if output.dim() > 2:
        last = [output.shape[1] * place // positions - 1 for place in range(1, positions + 1)]
        output = torch.stack([output[:, place] for place in last], 1).flatten(0, 1)
    return output.float().cpu().contiguous()


def read_probe(folder: Path, stored: torch.dtype) -> Probe | None:
    """Read the probe of a folder with weights of type `stored`; None if it has none.

    Raises `PermpruneError` if it is damaged.
    """
    path = folder / PROBE
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError) as error:
        raise PermpruneError(f"{path} is damaged ({first_line(error)}): {ADVICE}") from error
    if (outputs := tensors.pop(OLD_OUTPUTS, None)) is not None:
        rounding = 8 * torch.finfo(stored).eps if stored.itemsize < 4 else 0.0
        tolerance: Tensor | None = (rounding * outputs.abs().max()).clamp(min=1e-4) if outputs.numel() else None
    else:
        outputs, tolerance = tensors.pop(OUTPUTS, None), tensors.pop(TOLERANCE, None)
    fits = outputs is not None and outputs.dtype == torch.float32 and outputs.numel()
    if outputs is None or not fits or not tensors or tolerance is None or tolerance.numel() != 1:
        raise PermpruneError(f"{path} is damaged (it must hold inputs, fp32 outputs and a tolerance): {ADVICE}")
    return Probe(tensors, outputs, float(tolerance))


def check_outputs(model: PreTrainedModel, probe: Probe, what: str, advice: str = ADVICE) -> float:
    """Return the largest absolute difference between the model's outputs and those of the probe.

    They are computed in fp32, those of a packed model in its own types. Raises `PermpruneError` if the difference
    exceeds the probe's tolerance, or if the model does not run on the probe. In the message, `what` names the model and
    `advice` says what to do.
    """
    difference = output_difference(model, probe, what)
    if not difference <= probe.tolerance:
        raise PermpruneError(
            f"{what} computes other outputs than the masked model did (they differ by {difference:.2g}, where rounding "
            f"explains {probe.tolerance:.2g}): {advice}"
        )
    return difference


def output_difference(model: PreTrainedModel, probe: Probe, what: str) -> float:
    """Return the difference that `check_outputs` compares with the tolerance. Raises `PermpruneError` likewise."""
    known = argument_names(model)
    try:
        if unknown := sorted(probe.inputs.keys() - set(known)):
            raise TypeError(f"it takes no {unknown[0]!r}")
        with nullcontext() if is_packed(model) else in_fp32(model):
            outputs = probe.outputs_of(model)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise PermpruneError(f"the model does not run on the examples of {PROBE} ({first_line(error)})") from error
    if outputs.shape != probe.outputs.shape:
        shapes = tuple(outputs.shape), tuple(probe.outputs.shape)
        raise PermpruneError(f"{what} has outputs of shape {shapes[0]}, and {PROBE} {shapes[1]}: {ADVICE}")
    return largest_difference(probe.outputs, outputs)[0]


def largest_difference(old: Tensor, new: Tensor) -> tuple[float, float]:
    """Return the largest absolute difference and the largest absolute value in `old`, both over finite values.

    The difference is infinite if the two tensors are not finite at the same positions.
    """
    if old.numel() == 0:
        return 0.0, 0.0
    finite = torch.isfinite(old)
    if not torch.equal(finite, torch.isfinite(new)):
        return float("inf"), 0.0
    old, new = (torch.where(finite, value, 0).double() for value in (old, new))
    return float((old - new).abs().max()), float(old.abs().max())


def weight_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each tensor in the safetensors files of a folder, with its type and shape, by its name.

    Several threads read the files. Raises `SafetensorError` or `OSError` if a file cannot be read.
    """
    with ExitStack() as opened, ThreadPoolExecutor() as threads:
        paths = sorted(path for path in folder.glob("*.safetensors") if path.name != PROBE)
        files = [opened.enter_context(safe_open(path, "pt")) for path in paths]
        named = [(file, name) for file in files for name in file.keys()]  # noqa: SIM118 (no mapping)
        digests = threads.map(lambda entry: digest_of([(entry[1], entry[0].get_tensor(entry[1]))]), named)
        return {name: digest for (_, name), digest in zip(named, digests, strict=True)}


def require_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Raise `PermpruneError` if a tensor in a folder is not the one with this digest in the folder's record.

    A record without digests, of an earlier release, and a folder without weights are not compared.
    """
    present = weight_digests(folder) if digests else {}
    changed = [name for name in {**digests, **present} if digests.get(name) != present.get(name)] if present else []
    if changed:
        more = f", as are {len(changed) - 1} other tensors" if len(changed) > 1 else ""
        raise PermpruneError(
            f"{folder}: {changed[0]} is not as permprune wrote it{more}: copy the folder again; if you trained it, "
            "do so after permprune.load, and write it with permprune.save"
        )


@contextmanager
def _rounded(model: nn.Module) -> Iterator[None]:
    """Context manager: the outputs of all modules without submodules are rounded to bf16."""

    def rounded(_module: nn.Module, _inputs: object, output: Any) -> Any:
        narrow = isinstance(output, Tensor) and output.is_floating_point()
        return output.bfloat16().to(output.dtype) if narrow else output

    modules = [module for module in model.modules() if not any(module.children())]
    with attached(module.register_forward_hook(rounded) for module in modules):
        yield
