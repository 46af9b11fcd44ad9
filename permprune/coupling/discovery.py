"""Discover the channel spaces and sites of a model from an example batch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from permprune.coupling.build import build_spaces
from permprune.coupling.sites import find_sites
from permprune.coupling.space import Coupling
from permprune.coupling.trace import trace
from permprune.system.failures import failures_reported


@failures_reported()
def discover(model: nn.Module, example: Mapping[str, Tensor]) -> Coupling:
    """Trace a model and return its channel spaces and sites.

    `example` is a small batch, passed to the model's forward as keyword arguments. Only the code that runs on this
    batch is analyzed, so it should contain every kind of input that the model will receive. Raises `Untraceable`, a
    `PermpruneError`, if `torch.export` cannot trace the model.
    """
    walk, graph = trace(model, example)
    sites, readers = find_sites(model, walk, graph)
    return Coupling(build_spaces(walk, readers), sites)
