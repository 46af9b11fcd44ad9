"""Overlap between the evaluation data and the calibration data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from permprune.examples import Examples
from permprune.system.progress import log

SPAN = 32
"""Length in tokens of a run that two texts are unlikely to share by chance."""

QUOTED = 0.01
"""Fraction of the evaluation data up to which an overlap causes no warning, because texts quote each other."""


def overlap(calibration: Sequence[Examples], evaluation: Examples) -> float:
    """The fraction, from 0 to 1, of the evaluation data that also occurs in the calibration data.

    For windows of text, this is the fraction of tokens in a run of `SPAN` tokens that occurs in a calibration window at
    any offset; windows shorter than `SPAN` are compared as a whole. For images, speech and sentences, it is the
    fraction of examples whose inputs, without labels and padding, are equal to those of a calibration example.
    `calibration` is a list of sets of examples.
    """
    names = sorted(set(evaluation).intersection(*calibration) - {"labels", "token_type_ids"})
    inputs = [name for name in names if not name.startswith("decoder_") and not name.endswith("mask")]
    if not inputs:
        return 0.0
    if inputs == ["input_ids"] and "attention_mask" not in evaluation:
        return _covered([examples["input_ids"].cpu() for examples in calibration], evaluation["input_ids"].cpu())
    known = {digest for examples in calibration for digest in _digests(examples, inputs)}
    return sum(digest in known for digest in _digests(evaluation, inputs)) / len(evaluation)


def warn_of_overlap(share: float, other: str = "calibration") -> None:
    """Log a warning if the overlap with the `other` data is larger than `QUOTED`: the evaluation may be misleading."""
    if share > QUOTED:
        log.warning("%.0f %% of the evaluation data are also in the %s data: use other data", 100 * share, other)


def _covered(calibration: list[Tensor], windows: Tensor) -> float:
    """The fraction of the tokens of windows (count, length) in a run that occurs in the calibration windows."""
    span = min(SPAN, *(windowed.shape[1] for windowed in (*calibration, windows)))
    weights = torch.randint(-(2**63), 2**63 - 1, (span,), generator=torch.Generator().manual_seed(0))
    known = torch.cat([_run_hashes(windowed, weights).flatten() for windowed in calibration]).unique()
    shared = torch.isin(_run_hashes(windows, weights), known)
    covered = torch.zeros_like(windows, dtype=torch.bool)
    for place in range(span):
        covered[:, place : place + shared.shape[1]] |= shared
    return float(covered.double().mean())


def _run_hashes(windows: Tensor, weights: Tensor) -> Tensor:
    """A 64-bit hash of every run of tokens in windows, int64 (count, length): int64 (count, length - span + 1).

    `weights` are the coefficients of the hash, int64 (span,).
    """
    runs = windows.shape[1] - len(weights) + 1
    total = torch.zeros(len(windows), runs, dtype=torch.int64)
    for place, weight in enumerate(weights):
        total += weight * windows[:, place : place + runs]
    return total


def _digests(examples: Examples, names: Sequence[str]) -> list[bytes]:
    """A digest of the tensors `names` of each example, without padding."""
    digests = []
    for example in examples.split(1):
        mask = example.get("attention_mask")
        digest = hashlib.blake2b(digest_size=16)
        for name in names:
            tensor = example[name].cpu()
            if mask is not None and mask.shape == tensor.shape[:2]:
                tensor = tensor[mask.cpu().bool()]
            elif name == "pixel_values" and tensor.dim() == 5:  # (1, images, ...), padded with empty images
                tensor = tensor[0, tensor[0].flatten(1).any(1)]
            elif name == "input_values":  # a waveform, padded with zeros
                tensor = tensor[:, : tensor.shape[1] - int(tensor[0].flip(0).eq(0).long().cumprod(0).sum())]
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        digests.append(digest.digest())
    return digests
