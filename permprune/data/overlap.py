"""How much of what a model is measured on stands in its calibration as well."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from permprune.examples import Examples
from permprune.system.progress import log

SPAN = 32
"""Tokens in a row that two texts hardly share unless one of them holds a part of the other."""

QUOTED = 0.01
"""The share of an evaluation up to which an overlap is not spoken of: texts quote each other."""


def overlap(calibration: Sequence[Examples], evaluation: Examples) -> float:
    """The share of an evaluation that the calibration, given in parts, holds as well: from 0 to 1.

    Of windows of text it is the share of tokens that lie in a run of `SPAN` tokens which occurs in a window of the
    calibration, however either text was cut; shorter windows are looked for whole. Of images, speech and sentences it
    is the share of examples whose inputs, labels and padding apart, are those of an example of the calibration.
    """
    names = sorted(set(evaluation).intersection(*calibration) - {"labels", "token_type_ids"})
    inputs = [name for name in names if not name.startswith("decoder_") and not name.endswith("mask")]
    if not inputs:
        return 0.0
    if inputs == ["input_ids"] and "attention_mask" not in evaluation:
        return _covered([part["input_ids"].cpu() for part in calibration], evaluation["input_ids"].cpu())
    known = {digest for part in calibration for digest in _digests(part, inputs)}
    return sum(digest in known for digest in _digests(evaluation, inputs)) / len(evaluation)


def warn_of_overlap(share: float) -> None:
    """Log a warning where so large a share of an evaluation was calibrated on that the figures say little."""
    if share > QUOTED:
        log.warning("%.0f %% of the evaluation is in the calibration: give another text or other files", 100 * share)


def _covered(calibration: list[Tensor], windows: Tensor) -> float:
    """The share of the tokens of windows (count, length) that lie in a run which the calibration's windows have."""
    span = min(SPAN, *(part.shape[1] for part in (*calibration, windows)))
    weights = torch.randint(-(2**63), 2**63 - 1, (span,), generator=torch.Generator().manual_seed(0))
    known = torch.cat([_run_hashes(part, weights).flatten() for part in calibration]).unique()
    found = torch.isin(_run_hashes(windows, weights), known)
    covered = torch.zeros_like(windows, dtype=torch.bool)
    for place in range(span):
        covered[:, place : place + found.shape[1]] |= found
    return float(covered.double().mean())


def _run_hashes(windows: Tensor, weights: Tensor) -> Tensor:
    """A hash of every run of tokens in windows int64 (count, length), modulo 2^64: (count, length - span + 1)."""
    runs = windows.shape[1] - len(weights) + 1
    total = torch.zeros(len(windows), runs, dtype=torch.int64)
    for place, weight in enumerate(weights):
        total += weight * windows[:, place : place + runs]
    return total


def _digests(examples: Examples, names: Sequence[str]) -> list[bytes]:
    """A digest of each example's tensors of these names, without the positions that are padding."""
    mask = examples.get("attention_mask")
    found = []
    for at in range(len(examples)):
        digest = hashlib.blake2b(digest_size=16)
        for name in names:
            tensor = examples[name][at].cpu()
            if mask is not None and mask.shape == examples[name].shape[:2]:
                tensor = tensor[mask[at].cpu().bool()]
            elif tensor.dim() == 1 and tensor.is_floating_point():  # a wave, padded with zeros
                tensor = tensor[: len(tensor) - int(tensor.flip(0).eq(0).long().cumprod(0).sum())]
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        found.append(digest.digest())
    return found
