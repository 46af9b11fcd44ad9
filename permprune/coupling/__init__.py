"""Coupling: which channels of a model must move together, discovered from its graph.

`discover` traces a model and returns its channel spaces and sites, `observe` runs it and returns its sites alone;
`fold` writes a permutation of a space into the parameters; `verify` proves that a space may be permuted.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from permprune.coupling.build import build_spaces
from permprune.coupling.fold import fold, fold_all, fold_parameter, inverse
from permprune.coupling.observe import observe
from permprune.coupling.sites import find_sites
from permprune.coupling.space import ChannelSpace, Coupling, Member, Site
from permprune.coupling.trace import Untraceable, canonical_names, trace
from permprune.coupling.verify import verify

__all__ = [
    "ChannelSpace",
    "Coupling",
    "Member",
    "Site",
    "Untraceable",
    "canonical_names",
    "discover",
    "fold",
    "fold_all",
    "fold_parameter",
    "inverse",
    "observe",
    "verify",
]


def discover(model: nn.Module, example: Mapping[str, Tensor]) -> Coupling:
    """The channel spaces and sites of a model.

    `example` is a small batch: the keyword arguments of the model's forward. Only what runs on it is seen, so
    it should hold every kind of input that the model will be given. Raises `Untraceable`, a `PermpruneError`, when the
    model cannot be traced.
    """
    walk, graph = trace(model, example)
    sites, readers = find_sites(model, walk, graph)
    return Coupling(build_spaces(walk, readers), sites)
