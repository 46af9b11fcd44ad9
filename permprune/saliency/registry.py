"""Saliencies by name."""

from __future__ import annotations

from permprune.registry import method_of
from permprune.saliency.base import Saliency
from permprune.saliency.magnitude import Magnitude
from permprune.saliency.obs import OBS
from permprune.saliency.ria import RIA
from permprune.saliency.wanda import Wanda

SALIENCIES: dict[str, type[Saliency]] = {metric.name: metric for metric in (Magnitude, Wanda, RIA, OBS)}


def saliency(given: str | Saliency) -> Saliency:
    """The saliency of that name, such as "wanda" or "ria:power=1", or the object itself (`method_of`)."""
    return method_of(given, Saliency, SALIENCIES)  # type: ignore[type-abstract]
