"""The layers to prune (the linears inside a model's repeated blocks) and the weights that stay dense there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from permprune.errors import PermpruneError
from permprune.models.experts import WRITES, Experts, is_experts
from permprune.options import Share
from permprune.pattern import Pattern
from permprune.system.progress import log

SHOWN = 5
"""Maximum number of names of dense weights in a warning."""

ROWS = "_permprune_rows"
"""Attribute of a module of whose weight this process holds some rows (`load_rows`): (these rows, number of all)."""

VALUES = "_permprune_values"
"""Attribute of a parameter that rests elsewhere: a function that returns its values, where they rest."""


@dataclass(frozen=True)
class Layer:
    """A linear layer y = x W^T: a module, or a matrix of an expert.

    `owner` is the module of the model that holds the parameter with the weight, as its `attribute`, and `owner_name`
    its name. `module` is called with the layer's inputs: the owner or, for expert number `expert`, an `ExpertMatrix`;
    all experts share a parameter. `transposed` is True if the weight is stored as (inputs, outputs), as by `Conv1D`.
    """

    owner_name: str
    _: KW_ONLY
    owner: nn.Module
    module: nn.Module
    transposed: bool
    attribute: str = "weight"
    expert: int | None = None

    @property
    def name(self) -> str:
        """The name of the module; for a matrix of an expert with the expert's number and the parameter."""
        return self.owner_name if self.expert is None else f"{self.owner_name}.{self.expert}.{self.attribute}"

    @property
    def parameter(self) -> str:
        """The name of the parameter in `named_parameters()`."""
        return f"{self.owner_name}.{self.attribute}"

    @property
    def reads_input(self) -> bool:
        """Whether the layer reads the input of `owner`, and not what another layer of the same experts computes."""
        return self.attribute != WRITES

    @property
    def stored(self) -> nn.Parameter:
        """The parameter that holds the weight."""
        parameter: nn.Parameter = getattr(self.owner, self.attribute)
        return parameter

    @property
    def weight(self) -> Tensor:
        """The weight as (rows, channels) = (outputs, inputs).

        It shares memory with the parameter, unless that is at rest elsewhere (`values_of`).
        """
        return values_of(self.stored, self.part_of)

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight, (rows, channels)."""
        return self.part_of(torch.empty(self.stored.shape, device="meta")).shape

    @property
    def rows(self) -> slice:
        """The rows of the layer that `weight` has: all, unless processes divide them (`load_rows`)."""
        return getattr(self.owner, ROWS, (slice(None), 0))[0]  # type: ignore[no-any-return]

    @property
    def row_count(self) -> int:
        """The number of rows of the whole layer."""
        return getattr(self.owner, ROWS, (slice(None), self.shape[0]))[1]  # type: ignore[no-any-return]

    def part_of(self, stored: Tensor) -> Tensor:
        """The layer's part of a tensor of the parameter's shape, as (rows, channels); it shares memory with it."""
        matrix = stored if self.expert is None else stored[self.expert]
        return matrix.T if self.transposed else matrix

    def input_of(self, site: str) -> str:
        """The name of what the layer reads of the tensor `site`: of an expert's matrix, the tokens of that expert."""
        return site if self.expert is None else f"{site}[{self.expert}]"


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks, in order.

    These are the elements of the outermost `ModuleList`s and `Sequential`s that have at least two elements, each of
    which contains a linear and is none itself: lists of bare linears are heads.
    """
    return [block for chain in block_chains(model) for block in chain]


def block_chains(model: nn.Module) -> list[list[nn.Module]]:
    """The model's repeated blocks by list, such as those of an encoder and those of a decoder."""
    chains: list[list[nn.Module]] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) > 1 and all(map(_has_linear, child)):
                chains.append([*child])
            else:
                visit(child)

    visit(model)
    return chains


def prunable_layers(model: nn.Module, pattern: Pattern, exclude: Iterable[str] = ()) -> list[Layer]:
    """Every linear inside the repeated blocks, except those whose name matches a glob of `exclude`.

    Embeddings and heads are outside the blocks and stay dense, as in the literature (SparseGPT, Wanda). Raises
    `PermpruneError` if a glob matches no layer, if no layer is left, if M does not divide a layer's input width, or if
    weights are not finite, packed or quantized.
    """
    require_changeable(model)
    layers = block_linears(model)
    if layers:
        layers = _less_excluded(layers, exclude)
    if not layers:
        raise PermpruneError("no linear layer to prune: the model has no repeated blocks, or all are excluded")
    for layer in layers:
        pattern.require_divisible(layer.shape[1], layer.name)
        if not layer.stored.is_meta:
            require_finite(layer)
    return layers


def block_linears(model: nn.Module) -> list[Layer]:
    """Every linear inside the repeated blocks, and every matrix of an expert there."""
    inside = _modules_inside(model)
    return [
        layer for name, module in model.named_modules() if id(module) in inside for layer in linears_of(name, module)
    ]


def ends_of(model: nn.Module) -> list[nn.Module]:
    """Return the embedding table and the output layer of a Transformer, those of the two that it has."""
    ends = []
    if isinstance(model, PreTrainedModel):
        for end in (model.get_input_embeddings, model.get_output_embeddings):
            with suppress(NotImplementedError):  # raised by models of audio, which have no table
                ends.append(end())
    return [module for module in ends if module is not None]


def linears_of(name: str, module: nn.Module) -> list[Layer]:
    """The linear layers that a module of this name holds itself: one, those of experts, or none."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return [Layer(name, owner=module, module=module, transposed=isinstance(module, Conv1D))]
    if not is_experts(module):
        return []
    transposed: Any = module.is_transposed
    return [
        Layer(name, owner=module, module=one, transposed=transposed, attribute=one.attribute, expert=one.index)
        for expert in Experts(module).matrices
        for one in expert
    ]


@dataclass(frozen=True)
class DenseWeights:
    """The `share` of the weights inside the blocks that stay dense without being excluded, and their `merged` names."""

    share: Share
    layers: list[str]

    def __str__(self) -> str:
        """A message that names the weights; empty if there are none."""
        if not self.layers:
            return ""
        more = f" and {len(self.layers) - SHOWN} more" if len(self.layers) > SHOWN else ""
        shown = ", ".join(self.layers[:SHOWN]) + more
        return f"{100 * self.share:.3g} % of the weights inside the blocks stay dense: {shown}"

    def warn(self) -> None:
        """Log a warning that names the weights, if there are any."""
        if self.layers:
            log.warning("%s", self)


def dense_weights(model: nn.Module, pruned: Iterable[str], exclude: Iterable[str] = ()) -> DenseWeights:
    """Find the weights inside the repeated blocks that are neither in the layers named `pruned` nor excluded.

    Considered are all parameters with at least two dimensions except biases and embeddings, such as routers.
    """
    inside, pruned, exclude = _modules_inside(model), set(pruned), tuple(exclude)
    total, dense = 0, {}
    for owner, module in model.named_modules():
        if id(module) not in inside or isinstance(module, nn.Embedding):
            continue
        layers = linears_of(owner, module)
        for name, parameter in module.named_parameters(owner, recurse=False):
            if parameter.squeeze().dim() < 2 or "bias" in name.rpartition(".")[2]:
                continue
            total += parameter.numel()
            parts = [layer.name for layer in layers if layer.parameter == name] or [owner]
            left = [one for one in parts if one not in pruned and not any(fnmatch(one, glob) for glob in exclude)]
            if left:
                dense[name] = parameter.numel() * len(left) // len(parts)
    return DenseWeights(sum(dense.values()) / total if total else 0.0, merged(dense))


def merged(names: Iterable[str]) -> list[str]:
    """The names with those that differ only in numbers merged into one, with * for the number."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?![^.])", "*", name) for name in names))


def _modules_inside(model: nn.Module) -> set[int]:
    """The ids of the modules inside the repeated blocks."""
    return {id(module) for block in blocks(model) for module in block.modules()}


def _less_excluded(layers: list[Layer], exclude: Iterable[str]) -> list[Layer]:
    """The layers whose name matches none of the globs. Raises `PermpruneError` if a glob matches no layer."""
    excluded: set[str] = set()
    for glob in exclude:
        matched = {layer.name for layer in layers if fnmatch(layer.name, glob)}
        if not matched:
            raise PermpruneError(f'exclude "{glob}" matches no layer that would be pruned, such as {layers[0].name}')
        excluded |= matched
    return [layer for layer in layers if layer.name not in excluded]


def is_packed(model: nn.Module) -> bool:
    """Whether the model's weights are packed or quantized."""
    return getattr(model, "hf_quantizer", None) is not None


def require_changeable(model: nn.Module) -> None:
    """Raise `PermpruneError` if the model's weights are packed or quantized, and so cannot be changed.

    A model without weights has no quantizer yet: there the config is looked at.
    """
    if is_packed(model) or getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise PermpruneError(
            "the weights are packed or quantized: unpack them first (permprune unpack), or give the original model"
        )


def require_finite(layer: Layer) -> None:
    """Raise `PermpruneError` if the layer's weight contains NaN or infinity."""
    if not torch.isfinite(layer.weight).all():
        raise PermpruneError(f"{layer.name} holds NaN or infinite weights: repair the checkpoint before pruning")


def _has_linear(module: nn.Module) -> bool:
    """Whether a module contains a linear, and is none itself."""
    return any(isinstance(inner, (nn.Linear, Conv1D)) for inner in module.modules() if inner is not module)


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Map every name of every parameter to the first name of the same tensor (tied weights have several names)."""
    first: dict[Any, str] = {}
    return {
        name: first.setdefault(_identity(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _identity(parameter: Tensor) -> Any:
    if parameter.numel() == 0 or parameter.device.type == "meta":
        return id(parameter)
    return (parameter.device, parameter.data_ptr(), parameter.shape, parameter.stride(), parameter.dtype)


def at_rest(values: Callable[[], Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Return a parameter that rests elsewhere, with values that are read each time they are used.

    All its elements are one NaN, so that code that does not read them as `values_of` cannot go unnoticed.
    """
    everywhere = torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)
    parameter = nn.Parameter(everywhere, requires_grad=False)
    setattr(parameter, VALUES, values)
    return parameter


def rests(parameter: Tensor) -> bool:
    """Whether the values of a parameter rest elsewhere."""
    return hasattr(parameter, VALUES)


def values_of(parameter: Tensor, part_of: Callable[[Tensor], Tensor] = lambda whole: whole) -> Tensor:
    """Return the values of a parameter, or the part of them that `part_of` takes.

    Of one that rests elsewhere they are a copy in its type and on its device.
    """
    values: Callable[[], Tensor] | None = getattr(parameter, VALUES, None)
    if values is None:
        return part_of(parameter.data)
    return part_of(values()).to(parameter.device, parameter.dtype, copy=True)
