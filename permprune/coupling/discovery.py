"""From a model and an example batch to its channel spaces and sites."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from permprune.coupling.build import build_spaces
from permprune.coupling.sites import find_sites
from permprune.coupling.space import Coupling
from permprune.coupling.trace import trace
from permprune.system.out_of_memory import memory_reported


@memory_reported()
def discover(model: nn.Module, example: Mapping[str, Tensor]) -> Coupling:
    """The channel spaces and sites of a model.

    `example` is a small batch: the keyword arguments of the model's forward. Only what runs on it is seen, so
    it should hold every kind of input that the model will be given. Raises `Untraceable`, a `PermpruneError`, when the
    model cannot be traced.
    """
    walk, graph = trace(model, example)
    sites, readers = find_sites(model, walk, graph)
    return Coupling(build_spaces(walk, readers), sites)
