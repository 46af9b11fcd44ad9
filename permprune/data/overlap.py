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

    For windows of text, this is the fraction of tokens in a run of `SPAN` tokens that occurs anywhere in one of the
    `calibration` sets. Otherwise, it is the fraction of examples whose inputs, without labels and padding, occur there.
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

    def hashes(windows: Tensor) -> Tensor:  # of every run, int64 (count, length - span + 1)
        return torch.stack([window.unfold(0, span, 1) @ weights for window in windows])

    known = torch.cat([hashes(windowed).flatten() for windowed in calibration]).unique()
    shared = torch.isin(hashes(windows), known)
    covered = torch.zeros_like(windows, dtype=torch.bool)
    for place in range(span):
        covered[:, place : place + shared.shape[1]] |= shared
    return float(covered.double().mean())


def _digests(examples: Examples, names: Sequence[str]) -> list[bytes]:
    """A digest of the tensors `names` of each example, without padding: what a mask hides, and zeros."""
    digests = []
    for example in examples.split(1):
        mask, digest = example.get("attention_mask"), hashlib.blake2b(digest_size=16)
        for name in names:
            tensor = example[name]
            masked = mask is not None and mask.shape == tensor.shape[:2]
            tensor = tensor[mask.bool()] if masked else tensor[tensor != 0]  # type: ignore[union-attr]
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        digests.append(digest.digest())
    return digests
