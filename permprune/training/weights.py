"""The weights to train: their choice, and low-rank adapters through which masked matrices are trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from permprune.errors import PermpruneError
from permprune.models.layers import Layer, blocks, ends_of
from permprune.models.narrow_weights import narrowed


def trained_weights(model: PreTrainedModel, kind: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a kind, by name: "all"; "norms", which are norms, biases and the head; or "head".

    The head consists of the linear layers outside the repeated blocks, except for the token embeddings and the layer
    that returns token logits; norms and biases are all parameters of one dimension. Raises `PermpruneError` if the
    model has no such parameters.
    """
    inside = {id(p) for block in blocks(model) for p in block.parameters()}
    tokens = {id(p) for end in ends_of(model) for p in end.parameters()}
    head = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Linear)
        for p in module.parameters()
        if id(p) not in inside | tokens
    }
    chosen = {
        name: p
        for name, p in model.named_parameters()
        if kind == "all" or id(p) in head or (kind == "norms" and p.dim() == 1)
    }
    if not chosen:
        raise PermpruneError("the model has no head: give --train all, or norms")
    return chosen


def weight_scale(layers: Iterable[Layer]) -> float:
    """Return the root mean square of the layers' nonzero weights, the median over the layers."""

    def scale(weight: Tensor) -> float:
        return float(weight.float().norm()) / math.sqrt(max(1, int(weight.count_nonzero())))

    return median(scale(layer.weight.detach()) for layer in layers)


class Adapter(nn.Module):
    """A low-rank change of the nonzero entries of a matrix: W + mask * (left right).

    After LoRA (Hu et al. 2021, arXiv 2106.09685); the mask keeps zeros of W at zero. W is (..., p, q), and the rank is
    at most that of W. The change is zero at first, because `left`, (..., p, rank), is; `right`, (..., rank, q), is
    random, drawn from `generator`.
    """

    mask: Tensor

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        *batch, p, q = weight.shape
        rank = min(rank, p, q)
        drawn = torch.rand(*batch, rank, q, generator=generator).mul_(2).sub_(1).div_(q**0.5)
        self.left = nn.Parameter(weight.new_zeros(*batch, p, rank))
        self.right = nn.Parameter(drawn.to(weight))
        self.register_buffer("mask", weight != 0, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.addcmul(weight.to(self.left), self.mask, self.left @ self.right)


@contextmanager
def adapted(model: nn.Module, layers: Iterable[Layer], rank: int, seed: int) -> Iterator[dict[str, nn.Parameter]]:
    """A context in which the layers run with adapters of this rank; it returns the adapters' parameters by name.

    Weights in fp32 whose values bf16 represents are held in bf16 inside. At the end the adapters are merged into the
    weights, so that the model is as it was before except for the values of its weights. After an exception they are
    dropped. Experts that share a parameter have an adapter each.
    """
    generator = torch.Generator().manual_seed(seed)
    places = {layer.parameter: (layer.owner, layer.attribute) for layer in layers}
    narrow, merged = list[nn.Parameter](), False
    for module, attribute in places.values():
        weight = getattr(module, attribute)
        parametrize.register_parametrization(module, attribute, Adapter(weight.detach(), rank, generator))
        narrow += [weight] if narrowed(weight) else []
    try:
        adapters = {id(p) for module in model.modules() if isinstance(module, Adapter) for p in module.parameters()}
        yield {name: p for name, p in model.named_parameters() if id(p) in adapters}
        merged = True
    finally:
        for weight in narrow:
            weight.data = weight.data.float()
        for module, attribute in places.values():
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=merged)
