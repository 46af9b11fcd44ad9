"""Second moments of layer inputs, and factors of their inverse."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from permprune.calibration.symmetric import Symmetric, Symmetrics, SymmetricShelf, stored_elements
from permprune.errors import PermpruneError
from permprune.models.activation_checkpointing import recomputing
from permprune.models.experts import Routed
from permprune.models.forward import Padding
from permprune.models.hooks import hooked
from permprune.models.layers import Layer
from permprune.system import distributed, sharding
from permprune.system.progress import log
from permprune.system.shelf import Shelf

FEWEST = 128
"""The smallest number of tokens from which the moments of an expert's inputs are taken: the root mean square of a
normal channel is then known to about 6 %."""

ATTEMPTS = 4
"""Number of damping values that are tried, each ten times the previous one."""

NO_FACTOR = "the second moments of its inputs have no Cholesky factor"
ADVICE = "calibrate with --set precision=fp32, and check the calibration text"


def root_mean_square(moments: Float[Tensor, "channels channels"]) -> Float[Tensor, " channels"]:
    """Return the root mean square of each input channel over the tokens, (channels,), given H (channels, channels)."""
    return moments.diagonal().clamp_min(0).sqrt()


def inverse_factor(moments: Float[Tensor, "channels channels"], damping: float) -> Float[Tensor, "channels channels"]:
    """Return the upper triangular U with U^T U = (H + damping * mean diagonal * I)^-1.

    `moments` is H, fp32 (channels, channels), and so is U. With the damped H, U_jj^2 = [(H_F)^-1]_jj, where F are the
    channels from j on, and the squared norm of column j is [H^-1]_jj. If the damped H has no Cholesky factor, the
    damping is multiplied by 10, up to `ATTEMPTS` - 1 times; raises `PermpruneError` if that does not help.
    """
    # With rows and columns in reverse, the lower Cholesky factor of H becomes an upper one, whose inverse is U.
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
    if not damping:
        raise PermpruneError(f"{NO_FACTOR}: give a damping above 0")
    raise PermpruneError(f"{NO_FACTOR} even with more damping: {ADVICE}")


def cholesky(matrix: Float[Tensor, "channels channels"]) -> Float[Tensor, "channels channels"]:
    """Return the lower Cholesky factor of second moments with damping. Raises `PermpruneError` if they have none."""
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if failed or not torch.isfinite(lower).all():
        raise PermpruneError(f"{NO_FACTOR}: {ADVICE}")
    return lower


class InputMoments:
    """Accumulates the second moments of layer inputs.

    `readers` maps each site, the name of a tensor that layers read, to one of the layers that read it. Products and
    sums are computed in fp32, whatever the type of the activations: in bf16, rounding would give H negative
    eigenvalues, which a search would exploit. Only one triangle of each sum is in memory. With `half` the results are
    stored as correlations in fp16. With `whole`, the experts among the readers run on all tokens of their layer and not
    on those routed to them. Sums rest where tensors of `shelf` do, by default on the device; results are put aside.
    """

    def __init__(
        self, readers: dict[str, Layer], *, half: bool = False, whole: bool = False, shelf: Shelf | None = None
    ) -> None:
        self.readers, self.half, self.shelf = readers, half, Shelf() if shelf is None else shelf
        self.sites = {layer.name: site for site, layer in readers.items()}
        experts = {(layer.owner, layer.expert) for layer in readers.values() if layer.expert is not None}
        self.whole = experts if whole else set()
        self.sums = SymmetricShelf(self.shelf.another())
        for site, layer in readers.items():
            self.sums[site] = Symmetric.zeros(layer.shape[1], layer.stored.device)
        self.counts = dict.fromkeys(readers, 0)

    @contextmanager
    def observe(self, padding: Padding) -> Iterator[None]:
        """Add the layers' inputs inside the context, without padding; recomputed blocks are counted once."""

        def add(layer: Layer, inputs: Tensor, routed: Routed | None) -> None:
            if recomputing():
                return
            x, site = padding.real(inputs.detach(), routed, layer.owner), self.sites[layer.name]
            total = self.sums[site]
            total.add_products(x.flatten(0, -2).float())
            self.sums[site] = total
            self.counts[site] += x.shape[:-1].numel()

        with hooked(self.readers.values(), before=add, whole=self.whole):
            yield

    def result(self) -> Symmetrics:
        """Return H = X^T X / tokens over all ranks, by site, fp32 (channels, channels).

        Left out are the sites of experts that read fewer than `FEWEST` tokens, unless they ran on all. The sums are
        freed, so this can be called only once. Raises `PermpruneError` if activations overflowed.
        """
        counts, shelf = distributed.total(*self.counts.values()), self.shelf.another()
        moments = SymmetricShelf(shelf)
        for (site, layer), count in zip(self.readers.items(), counts, strict=True):
            total = self.sums.pop(site)
            distributed.add_(list(total.strips))
            if layer.expert is not None and count < FEWEST and not self.whole:
                continue
            moments[site] = _mean(total, count, site, half=self.half)
        shelf.put_aside()
        return Symmetrics(moments)


def warn_of_rare(rare: Collection[object], layers: Iterable[Layer]) -> None:
    """Log a warning that counts the experts that read too few tokens, if there are any; `layers` has all experts."""
    if rare:
        every = {(layer.owner, layer.expert) for layer in layers if layer.expert is not None}
        log.warning(
            "%d of %d experts read fewer than %d calibration tokens: their statistics are those of all tokens of their "
            "layers (more calibration text gives them their own)",
            *(len(rare), len(every), FEWEST),
        )


def accumulator_bytes(widths: Iterable[int]) -> int:
    """Return the bytes of the sums of `InputMoments` for tensors of these numbers of channels."""
    return 4 * sum(map(stored_elements, widths))


def moments_of(x: Float[Tensor, "*positions channels"], site: str) -> Float[Tensor, "channels channels"]:
    """Return the second moments of activations (..., channels) of any type, as `InputMoments` does for all of them."""
    rows = x.detach().flatten(0, -2).float()
    total = Symmetric.zeros(rows.shape[1], x.device)
    total.add_products(rows)
    return _mean(total, len(rows), site, half=False).dense()


def _mean(total: Symmetric, count: float, site: str, *, half: bool) -> Symmetric:
    """Return a sum divided by the number of tokens. Raises `PermpruneError` if it is not finite."""
    for strip in total.strips:
        strip /= count
    if sharding.total(sum(not torch.isfinite(strip).all() for strip in total.strips))[0]:
        raise PermpruneError(
            f"activations at {site} overflow on the calibration data: calibrate with --set precision=fp32"
        )
    return total.correlations() if half else total
