"""Saliencies by name."""

from __future__ import annotations

from permprune.errors import PermpruneError
from permprune.options import nearest
from permprune.saliency.base import Saliency
from permprune.saliency.magnitude import Magnitude
from permprune.saliency.obs import OBS
from permprune.saliency.ria import RIA
from permprune.saliency.wanda import Wanda

SALIENCIES: dict[str, type[Saliency]] = {metric.name: metric for metric in (Magnitude, Wanda, RIA, OBS)}


def saliency(name: str | Saliency) -> Saliency:
    """The metric of that name. Raises `PermpruneError` listing the names when there is none."""
    if isinstance(name, Saliency):
        return name
    if name not in SALIENCIES:
        raise PermpruneError(f'unknown saliency "{name}": {nearest(name, SALIENCIES)}')
    return SALIENCIES[name]()
