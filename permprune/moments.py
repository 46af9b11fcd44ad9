"""What the second moments H = X^T X / tokens of a layer's inputs say of its channels."""

from __future__ import annotations

import torch
from torch import Tensor

from permprune.errors import PermpruneError

ATTEMPTS = 4
"""Dampings tried, each ten times the one before."""


def root_mean_square(moments: Tensor) -> Tensor:
    """Of each input channel over the tokens, (channels,), for H (channels, channels)."""
    return moments.diagonal().clamp_min(0).sqrt()


def inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """The upper triangular U with U^T U = (H + damping * mean diagonal * I)^-1, for H fp32 (channels, channels).

    Its diagonal squared is [(H_F)^-1]_jj, F being the channels from j on; its columns' squared norms are [H^-1]_jj.
    Where H with so little damping has no Cholesky factor more is added; `PermpruneError` where that does not help.
    """
    # Read from the last channel to the first, a Cholesky factor of H is an upper one, whose inverse is U.
    mean = float(moments.diagonal().mean()) or 1.0
    for attempt in range(ATTEMPTS):
        damped = moments.flip(0, 1)
        damped.diagonal().add_(damping * 10**attempt * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            if torch.isfinite(factor).all() and factor.diagonal().all():
                return factor
    raise PermpruneError(
        "the second moments of its inputs have no Cholesky factor even with more damping: "
        "calibrate with --precision fp32, and check the calibration text"
    )
