"""Registry of saliency metrics by name."""

from __future__ import annotations

from permprune.registry import method_of
from permprune.saliency.base import Saliency
from permprune.saliency.magnitude import Magnitude
from permprune.saliency.obs import OBS
from permprune.saliency.ria import RIA
from permprune.saliency.wanda import Wanda

SALIENCIES: dict[str, type[Saliency]] = {metric.name: metric for metric in (Magnitude, Wanda, RIA, OBS)}


def saliency(given: str | Saliency) -> Saliency:
    """Return the saliency of a name such as "wanda" or "ria:power=1"; an object is returned as it is (`method_of`)."""
    return method_of(given, Saliency, SALIENCIES)  # type: ignore[type-abstract]
