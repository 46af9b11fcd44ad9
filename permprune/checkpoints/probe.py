"""The probe of a pruned model's folder: two examples and the masked model's outputs for them, to check the folder by.

The outputs are computed before the permutations are folded into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from permprune.errors import PermpruneError
from permprune.models.forward import forward_arguments, main_outputs
from permprune.models.signature import argument_names
from permprune.system.device import compute_device

PROBE = "probe.safetensors"

ANSWER = "answer"
"""Name of the outputs in a probe; the other tensors are arguments of the model's forward."""

ADVICE = "copy it again, or prune the model again"

Probe = Mapping[str, Tensor]


def make_probe(model: PreTrainedModel, inputs: Probe) -> dict[str, Tensor]:
    """Create a probe: `inputs`, keyword arguments of the model's forward, and the model's outputs for them, on the CPU.

    `inputs` may be a probe, whose outputs are then replaced.
    """
    own = {name: tensor.cpu().contiguous() for name, tensor in inputs.items() if name != ANSWER}
    return {**own, ANSWER: last_outputs(model, own)}


@torch.inference_mode()
def last_outputs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's first main output (see `main_outputs`) at the last position: fp32 (batch, classes or channels)."""
    device = compute_device(model)
    arguments = forward_arguments(model, {name: tensor.to(device) for name, tensor in inputs.items()})
    output: Tensor = main_outputs(model(**arguments))[0]
    return (output[:, -1] if output.dim() > 2 else output).float().cpu().contiguous()


def read_probe(folder: Path) -> dict[str, Tensor]:
    """Read the probe of a folder. Raises `PermpruneError` if it is missing or damaged."""
    path = folder / PROBE
    try:
        probe = load_file(path)
    except FileNotFoundError:
        raise PermpruneError(f"{folder} lacks {PROBE}: {ADVICE}") from None
    except (OSError, SafetensorError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PermpruneError(f"{path} is damaged ({reason}): {ADVICE}") from error
    answer = probe.get(ANSWER)
    if len(probe) < 2 or answer is None or answer.dtype != torch.float32 or not answer.numel():
        raise PermpruneError(f"{path} is damaged (it must hold inputs and fp32 outputs): {ADVICE}")
    return probe


def check_outputs(
    model: PreTrainedModel, probe: Probe, what: str, *, stored: torch.dtype, advice: str = ADVICE
) -> float:
    """The largest absolute difference between the model's outputs and those of the probe.

    Raises `PermpruneError` if the difference is larger than rounding the weights to dtype `stored` can explain, or if
    the model does not run on the probe. In the message, `what` names the model and `advice` says what to do.
    """
    expected = probe[ANSWER]
    found = _outputs_on(model, probe)
    rounding = 8 * torch.finfo(stored).eps if stored.itemsize < 4 else 0.0
    if found.shape != expected.shape:
        raise PermpruneError(f"{what} has outputs of shape {tuple(found.shape)}, and {PROBE} {tuple(expected.shape)}")
    difference = float((found - expected).abs().max())
    if not difference <= max(1e-4, rounding * float(expected.abs().max())):
        raise PermpruneError(
            f"{what} computes other outputs than the masked model did (they differ by {difference:.2g}): {advice}"
        )
    return difference


def _outputs_on(model: PreTrainedModel, probe: Probe) -> Tensor:
    """The model's outputs for a probe. Raises `PermpruneError` if the model does not run on it."""
    known = argument_names(model)
    inputs = {name: tensor for name, tensor in probe.items() if name != ANSWER}
    try:
        if unknown := sorted(inputs.keys() - set(known)):
            raise TypeError(f"it takes no {unknown[0]!r}")
        return last_outputs(model, inputs)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PermpruneError(f"the model does not run on the examples of {PROBE} ({reason})") from error
