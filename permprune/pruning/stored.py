"""The form in which orders are stored: folded permutations and gathers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from permprune.coupling.space import Coupling, Site
from permprune.models.layers import Layer
from permprune.pruning.problem import Orders, Problem


def fold_tables(coupling: Coupling, problems: list[Problem], orders: Orders) -> dict[str, Tensor]:
    """Return the permutations to fold, by space: int64 (blocks, size); blocks without an order keep the natural one."""
    tables: dict[str, Tensor] = {}
    sizes = {space.name: (space.blocks, space.size) for space in coupling.spaces}
    for problem in problems:
        if problem.space and problem.name in orders:
            blocks, size = sizes[problem.space]
            table = tables.setdefault(problem.space, torch.arange(size).repeat(blocks, 1))
            table[problem.block] = orders[problem.name]
    return tables


def reordered_outputs(coupling: Coupling, tables: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the outputs beside the logits whose channels the folded permutations move (see `Coupling.reordered`)."""
    natural = {name: torch.arange(table.shape[-1]).expand_as(table) for name, table in tables.items()}
    return coupling.reordered(name for name, table in tables.items() if not torch.equal(table, natural[name]))


def gather_places(site: Site, readers: list[Layer]) -> tuple[str, list[str]]:
    """Return the modules at which the `Gather` of a site reorders channels: (a module, []) or ("", modules).

    In the first case the output of a module is reordered, in the second the inputs of modules. `readers` are the
    layers that read the new order; if other modules read the site as well, its tensor must stay in the old order.
    """
    alone = {layer.parameter for layer in readers} == set(site.readers)
    modules = list(dict.fromkeys(layer.owner_name for layer in readers))
    return (site.gather[1], []) if site.gather[0] == "output" and alone else ("", modules)


@torch.no_grad()
def reorder_columns(stored: Tensor, layer: Layer, order: Tensor) -> Tensor:
    """Return a layer's parameter with its columns in a new order: of all experts, as one gather serves them all."""
    return stored.index_select(layer.channel_dim, order.to(stored.device))
