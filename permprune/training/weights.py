"""Which weights train, and how those that were pruned stay zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from permprune.errors import PermpruneError
from permprune.models.layers import blocks

TRAINED = ("all", "norms", "head")
"""All weights; norms, biases and the head; or the head alone."""


def trained_weights(model: PreTrainedModel, kind: str) -> dict[str, nn.Parameter]:
    """The parameters of a kind, one of `TRAINED`, by name.

    The head are linears outside the repeated blocks, but not those that give the logits of tokens; norms and biases are
    all parameters of one dimension. Raises `PermpruneError` for another kind, or where nothing is of it.
    """
    if kind not in TRAINED:
        raise PermpruneError(f'"{kind}" is nothing to train: choose {", ".join(TRAINED)}')
    inside = {id(p) for block in blocks(model) for p in block.parameters()}
    tokens = {id(p) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None
              for p in end.parameters()}  # fmt: skip
    head = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Linear)
        for p in module.parameters()
        if id(p) not in inside | tokens
    }
    found = {
        name: p
        for name, p in model.named_parameters()
        if kind == "all" or id(p) in head or (kind == "norms" and p.dim() == 1)
    }
    if not found:
        raise PermpruneError("the model has no head: give --train all, or norms")
    return found


@contextmanager
def masked(model: nn.Module, layers: Iterable[str]) -> Iterator[None]:
    """Inside, what is zero in the weights of these layers has no gradient.

    An optimiser that starts there leaves it zero.
    """

    def keep(mask: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda gradient: gradient.masked_fill(mask, 0.0)

    weights = [model.get_parameter(f"{layer}.weight") for layer in layers]
    handles = [weight.register_hook(keep(weight.detach() == 0)) for weight in weights]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
