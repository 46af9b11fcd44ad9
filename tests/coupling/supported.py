"""What coupling finds in every family that the tests run, as a page: python -m tests.coupling.supported"""

from __future__ import annotations

import copy
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from permprune.coupling.discovery import discover
from permprune.coupling.fold import fold, fold_all
from permprune.coupling.space import ChannelSpace, Coupling
from permprune.models.forward import main_outputs
from permprune.models.layers import block_linears, dense_weights

from .coupling_models import FAMILIES, Example, randomised

PAGE = Path(__file__).parents[2] / "docs" / "supported-models.md"
SHOWN = [name for name in FAMILIES if (family := name.partition(",")[0]) == name or family not in FAMILIES]
"""The families of the page: without variants of others."""

KINDS = ("d_ff", "head channels", "heads", "residual")

HEAD = """# Supported models

The channel spaces that permprune finds in tiny random models of these families, with transformers {transformers} and
torch {torch}. The code names no family: others work, too, if permprune knows their operators. `make supported` writes
this page.

- **d_ff**: the inner width of an MLP, or of the experts of a layer, of which each has its own order; or another width
  that is read in one place. Any order.
- **head channels**: the channels of values within each head, or each key/value head.
- **heads**: whole heads, groups of them, and heads within a group.
- **residual**: channels that are read in several places, all in one order. If a grouped convolution reads them, too,
  there is one space within its groups and one of whole groups.

Each number counts spaces. "Difference" is the largest change of an output in float64, relative to the largest output,
when each space alone and then all together are permuted at random; if it is not near 1e-16, the model's own code
computes norms in float32.

"Pruned" is the share of the weights inside the repeated blocks that lie in pruned layers. The matrices of each expert
are layers of their own; routers, kernels of convolutions, state matrices and the experts of Llama 4 stay dense.
Embeddings, biases and norms are not counted. Every run names the weights that stay dense, and so does `verify` for a
folder.

| family | pruned | {kinds} | difference | frozen |
|---|---:|{columns}---:|---|
"""


def movable(coupling: Coupling) -> list[ChannelSpace]:
    return [space for space in coupling.spaces if space.freedom != "frozen"]


def random_table(space: ChannelSpace, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(space.size, generator=generator) for _ in range(space.blocks)])


def random_tables(coupling: Coupling) -> dict[str, Tensor]:
    return {space.name: random_table(space, seed) for seed, space in enumerate(movable(coupling))}


def sites_of(space: ChannelSpace) -> frozenset[str | None]:
    return frozenset(member.site for member in space.readers)


def census(model: nn.Module, coupling: Coupling) -> dict[str, int]:
    """The number of movable spaces of each kind."""
    streams = {
        sites_of(space)
        for space in coupling.spaces
        if len(sites_of(space)) > 1 and ".heads" not in f".{space.name}"
    }  # fmt: skip
    counts = Counter(kind(model, space, streams) for space in movable(coupling))
    return {name: counts[name] for name in KINDS}


def kind(model: nn.Module, space: ChannelSpace, streams: set[frozenset[str | None]]) -> str:
    if sites_of(space) in streams:
        return "residual"
    if ".heads" in f".{space.name}":
        return "heads"
    member = space.readers[0]
    width = model.get_parameter(member.parameter).shape[member.dims[-1]]
    return "d_ff" if space.size == width else "head channels"


def frozen(coupling: Coupling) -> list[str]:
    """Each frozen space with the op that froze it, alike ones once."""
    lines = [f"{space.name}: {space.reason}" for space in coupling.spaces if space.freedom == "frozen"]
    return list(dict.fromkeys(re.sub(r"\.\d+\b", ".*", line) for line in lines))


@torch.no_grad()
def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    return [leaf for leaf in main_outputs(model(**example)) if isinstance(leaf, Tensor)]


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest change, as a share of the largest output."""
    pairs = zip(before, after, strict=True)
    return max(float((old - new).abs().max() / old.abs().max()) for old, new in pairs)


def worst(model: nn.Module, coupling: Coupling, example: Example) -> float:
    """The largest difference over each space alone and all together."""
    model = copy.deepcopy(model)
    before, tables = outputs(model, example), random_tables(coupling)
    found = []
    for space in movable(coupling):
        fold(model, space, tables[space.name])
        found.append(difference(before, outputs(model, example)))
        fold(model, space, tables[space.name].argsort(dim=-1))
    fold_all(model, tables, coupling)
    return max([*found, difference(before, outputs(model, example))])


def pruned(model: nn.Module, coupling: Coupling) -> str:
    """The share of the weights inside the blocks that is pruned: that of the linears which read a site."""
    readers = {reader for site in coupling.sites for reader in site.readers}
    layers = [layer.name for layer in block_linears(model) if layer.parameter in readers]
    return f"{100 * (1 - dense_weights(model, layers).share):.0f} %"


def row(name: str) -> str:
    family = FAMILIES[name]
    model, example = randomised(family.build()), family.example()
    coupling = discover(model, example)
    counts: list[Any] = list(census(model, coupling).values())
    difference = f"{worst(model, coupling, example):.0e}"
    cells = [name, pruned(model, coupling), *counts, difference]
    return " | ".join(["", *map(str, cells), "; ".join(frozen(coupling)) or "nothing", ""]).strip()


def page() -> str:
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    head = HEAD.format(**versions, kinds=" | ".join(KINDS), columns="---:|" * len(KINDS))
    return head + "".join(f"{row(name)}\n" for name in SHOWN)


def families(text: str) -> list[str]:
    """The families that a page lists, in order: the first column of its table."""
    cells = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    return [cell for cell in cells if cell not in ("family", "---")]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
