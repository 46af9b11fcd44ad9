"""Second moments of layer inputs, and factors of their inverse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.models.activation_checkpointing import recomputing
from permprune.models.layers import Layer
from permprune.models.padding import Padding
from permprune.system import distributed

ATTEMPTS = 4
"""Dampings tried, each ten times the one before."""


def root_mean_square(moments: Float[Tensor, "channels channels"]) -> Float[Tensor, " channels"]:
    """Of each input channel over the tokens, (channels,), for H (channels, channels)."""
    return moments.diagonal().clamp_min(0).sqrt()


def inverse_factor(moments: Float[Tensor, "channels channels"], damping: float) -> Float[Tensor, "channels channels"]:
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


class InputMoments:
    """Accumulates the second moments of layers' inputs.

    `readers` names one layer for each site. Each call's product is formed in fp32, whatever the type of the
    activations, and added in fp64: rounded to bf16 H has negative eigenvalues, which a search would find.
    """

    def __init__(self, readers: dict[str, Layer]) -> None:
        self.readers = readers
        self.sums = {
            site: layer.weight.new_zeros(2 * layer.weight.shape[1:], dtype=torch.float64)
            for site, layer in readers.items()
        }
        self.counts = dict.fromkeys(readers, 0)

    @contextmanager
    def observe(self, padding: Padding) -> Iterator[None]:
        """Add what the layers read inside, without the padding; blocks that run again in a backward pass count once."""

        def add(site: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if recomputing():
                return
            x = padding.real(args[0])
            self.sums[site] += inner_product(x).to(self.sums[site])
            self.counts[site] += x.shape[:-1].numel()

        handles = [layer.module.register_forward_pre_hook(partial(add, site)) for site, layer in self.readers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def result(self) -> dict[str, Tensor]:
        """By site, H = X^T X / tokens, fp32 (channels, channels), over all ranks; the sums are used up.

        Raises `PermpruneError` when a product overflowed.
        """
        distributed.add_(list(self.sums.values()))
        counts = distributed.total(*self.counts.values())
        moments = {}
        for site, count in zip(self.readers, counts, strict=True):
            moments[site] = (self.sums.pop(site) / count).float()
            if not torch.isfinite(moments[site]).all():
                raise PermpruneError(
                    f"activations at {site} overflow on the calibration data: calibrate with --precision fp32"
                )
        return moments


def inner_product(x: Float[Tensor, "*positions channels"]) -> Float[Tensor, "channels channels"]:
    """X^T X of activations (..., channels), fp32 (channels, channels) whatever their type."""
    rows = x.detach().flatten(0, -2).float()
    with torch.autocast(x.device.type, enabled=False):
        return rows.T @ rows
