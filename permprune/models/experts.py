"""Mixtures of experts: the matrices of each expert as linear layers of their own.

Transformers keeps the weights of all experts of a layer in a few 3-D parameters and runs them through its interface for
experts, `ALL_EXPERTS_FUNCTIONS`. Inside `run_in_turn` the experts run through an implementation that calls a module for
each matrix of each expert, so that hooks see what every one of them reads and writes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IN_TURN = "permprune"
"""The name of this module's implementation of experts among those of Transformers."""

EVENLY = "permprune_evenly"
"""The name of the implementation that gives every expert equally many tokens: it also runs on tensors without data."""

BATCHED = "batched_mm"
"""The implementation that `torch.export` traces with every expert's channels apart, on any device and in any type."""

WRITES = "down_proj"
"""The parameter whose matrices write an expert's output; those of the other one read its input."""

_ATTRIBUTE = "_permprune_experts"

Whole = Collection[tuple[nn.Module, int]]
"""Experts that run on all tokens (see `Experts.run`): their modules and numbers."""


@dataclass(frozen=True)
class Routed:
    """The tokens whose activations an expert reads, one in each row.

    `places` are their places among all `total` tokens that the layer reads: int64 (rows,), ascending.
    """

    places: Tensor
    total: int


class ExpertMatrix(nn.Module):
    """A matrix of one expert, `attribute[index]` of the experts' module; it is not part of the model.

    It is called with the expert's input (rows, channels) and the `Routed` tokens of its rows.
    """

    def __init__(self, experts: Experts, attribute: str, index: int) -> None:
        super().__init__()
        self.experts, self.attribute, self.index = experts, attribute, index

    def forward(self, x: Tensor, routed: Routed, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the outputs (rows, outputs); `weight` is the matrix and `bias` its bias."""
        y = x @ weight if self.experts.module.is_transposed else F.linear(x, weight)
        return y if bias is None else y + bias


class Experts:
    """All experts of one layer. `matrices` are, for each expert, the one that reads its input and the one after it."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.attributes = (reading_attribute(module), WRITES)
        self.matrices = [
            tuple(ExpertMatrix(self, attribute, index) for attribute in self.attributes)
            for index in range(len(getattr(module, WRITES)))
        ]

    def run(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, whole: Whole) -> Tensor:
        """Compute the output of the layer for `hidden`, both (tokens, channels), one expert after the other.

        `top_k_index` and `top_k_weights` are the experts of each token and their weights, (tokens, k). The experts in
        `whole` run on all tokens, so that hooks see them; the output is the same.
        """
        result, everyone = torch.zeros_like(hidden), torch.arange(len(hidden), device=hidden.device)
        # `unbind`, as the gradients of single selections would each have the size of all experts
        stacks = [getattr(self.module, attribute).unbind() for attribute in self.attributes]
        for index, matrices in enumerate(self.matrices):
            tokens, slots = self._routed(index, top_k_index)
            shown = everyone if (self.module, index) in whole else tokens
            if not len(shown):
                continue
            y = self._expert(hidden[shown], Routed(shown, len(hidden)), matrices, [stack[index] for stack in stacks])
            y = y[tokens] if shown is everyone else y
            result.index_add_(0, tokens, (y * top_k_weights[tokens, slots, None]).to(result.dtype))
        return result

    def _routed(self, index: int, top_k_index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens routed to an expert and, for each, which of its k experts it is: int64 (rows,)."""
        tokens, slots = torch.where(top_k_index == index)
        return tokens, slots

    def _expert(self, x: Tensor, routed: Routed, matrices: tuple[ExpertMatrix, ...], weights: list[Tensor]) -> Tensor:
        module = self.module
        first, last = matrices
        x = first(x, routed, weights[0], self._bias(first))
        x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
        x = last(x, routed, weights[1], self._bias(last))
        return module.post_expert_norm(x) if getattr(module, "has_post_expert_norm", False) else x

    def _bias(self, matrix: ExpertMatrix) -> Tensor | None:
        return getattr(self.module, f"{matrix.attribute}_bias")[matrix.index] if self.module.has_bias else None


class EvenExperts(Experts):
    """Experts that all get the same number of tokens, whatever the router's output."""

    def _routed(self, index: int, top_k_index: Tensor) -> tuple[Tensor, Tensor]:
        count = math.ceil(top_k_index.numel() / len(self.matrices))
        tokens = torch.arange(min(count, len(top_k_index)), device=top_k_index.device)
        return tokens, torch.zeros_like(tokens)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in 3-D parameters and runs them through Transformers' interface for experts."""
    if not all(hasattr(module, name) for name in ("is_transposed", "has_bias", "has_gate")):
        return False
    weights = [getattr(module, name, None) for name in (reading_attribute(module), WRITES)]
    return all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights)


def reading_attribute(module: nn.Module) -> str:
    """The name of the parameter whose matrices read the input of the experts."""
    return "gate_up_proj" if module.has_gate else "up_proj"


@contextmanager
def run_in_turn(layers: Iterable[Experts], whole: Whole = ()) -> Iterator[None]:
    """Context manager: experts run through `Experts.run`, which calls the modules in `Experts.matrices`.

    `whole` is that of `Experts.run`, for the given layers.
    """
    modules = {experts.module: experts for experts in layers}
    before = {module: vars(module).get(_ATTRIBUTE) for module in modules}
    try:
        for module, experts in modules.items():
            if before[module] and before[module][0] is not experts:
                raise AssertionError("nested contexts hold unlike matrices of the same experts")
            vars(module)[_ATTRIBUTE] = (experts, whole)
        with implementation(IN_TURN, modules):
            yield
    finally:
        for module in modules:
            vars(module)[_ATTRIBUTE] = before[module]
            if before[module] is None:
                del vars(module)[_ATTRIBUTE]


@contextmanager
def implementation(name: str, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context manager: the experts among the modules run through Transformers' implementation of this name."""
    configs: list[Any] = [module.config for module in modules if is_experts(module)]
    before = {id(config): config._experts_implementation for config in configs}
    try:
        for config in configs:
            config._experts_implementation = name
        yield
    finally:
        for config in configs:
            config._experts_implementation = before[id(config)]


def _run_in_turn(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The implementation `IN_TURN`, with the arguments of the others."""
    experts, whole = vars(module).get(_ATTRIBUTE) or (Experts(module), ())
    return experts.run(hidden_states, top_k_index, top_k_weights, whole)


def _run_evenly(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The implementation `EVENLY`."""
    return EvenExperts(module).run(hidden_states, top_k_index, top_k_weights, ())


ALL_EXPERTS_FUNCTIONS.register(IN_TURN, _run_in_turn)
ALL_EXPERTS_FUNCTIONS.register(EVENLY, _run_evenly)
