"""The weights that are pruned, every linear inside the repeated blocks of a model, and those that stay dense there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from permprune.errors import PermpruneError
from permprune.options import Share
from permprune.pattern import Pattern
from permprune.system.progress import log

SHOWN = 5
"""Names of dense weights in a warning, at most."""


@dataclass(frozen=True)
class Layer:
    """One linear map y = x W^T. `name` is its module's, `parameter` that of its weight in `named_parameters()`."""

    name: str
    module: nn.Module
    transposed: bool = False

    @property
    def parameter(self) -> str:
        return f"{self.name}.weight"

    @property
    def weight(self) -> Tensor:
        """The live weight as (rows, channels) = (outputs, inputs): a view where it is stored transposed."""
        stored: Tensor = self.module.weight.data  # type: ignore[union-attr,assignment]
        return stored.T if self.transposed else stored


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks: the elements of the outermost module lists that hold a linear in each, in order."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) > 1 and all(map(_has_linear, child)):
                found.extend(child)
            else:
                visit(child)

    visit(model)
    return found


def prunable_layers(model: nn.Module, pattern: Pattern, exclude: Iterable[str] = ()) -> list[Layer]:
    """Every linear inside the repeated blocks, less those whose name matches a glob of `exclude`.

    Embeddings, the output head and task heads stand outside the blocks and stay dense, as in the literature
    (SparseGPT, Wanda). Raises `PermpruneError` when a glob matches none of them, when nothing is left, when M does not
    divide a width, or when a weight holds NaN or infinity (`require_finite`; weights on the meta device are not there
    to look at) or is packed (`require_changeable`).
    """
    require_changeable(model)
    layers = block_linears(model)
    if layers:
        layers = _less_excluded(layers, exclude)
    if not layers:
        raise PermpruneError("no linear layer to prune: the model has no repeated blocks, or all are excluded")
    for layer in layers:
        pattern.require_divisible(layer.weight.shape[1], layer.name)
        if not layer.weight.is_meta:
            require_finite(layer)
    return layers


def block_linears(model: nn.Module) -> list[Layer]:
    """Every linear inside the repeated blocks."""
    inside = _modules_inside(model)
    return [
        Layer(name, module, isinstance(module, Conv1D))
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, (nn.Linear, Conv1D))
    ]


@dataclass(frozen=True)
class DenseWeights:
    """Weights inside the repeated blocks that nobody chose to leave dense.

    `share` is theirs of all weights inside the blocks; `layers` are the parameters' names, those that differ in numbers
    alone once, with *.
    """

    share: Share
    layers: list[str]

    def __str__(self) -> str:
        """A sentence that names them; empty if there are none."""
        if not self.layers:
            return ""
        more = f" and {len(self.layers) - SHOWN} more" if len(self.layers) > SHOWN else ""
        shown = ", ".join(self.layers[:SHOWN]) + more
        return f"{100 * self.share:.3g} % of the weights inside the blocks stay dense: {shown}"

    def warn(self) -> None:
        """Log a warning that names them, if there are any."""
        if self.layers:
            log.warning("%s", self)


def dense_weights(model: nn.Module, pruned: Iterable[str], exclude: Iterable[str] = ()) -> DenseWeights:
    """What stays dense inside the repeated blocks beside the layers `pruned`, given by name.

    Such are fused experts (3-D weights), their routers, kernels of convolutions: every parameter that has two
    dimensions or more and is no bias and no embedding. Layers that match a glob of `exclude` are dense by choice.
    """
    inside, pruned, exclude = _modules_inside(model), set(pruned), tuple(exclude)
    total, dense = 0, {}
    for owner, module in model.named_modules():
        if id(module) not in inside or isinstance(module, nn.Embedding):
            continue
        for name, parameter in module.named_parameters(owner, recurse=False):
            if parameter.squeeze().dim() < 2 or "bias" in name.rpartition(".")[2]:
                continue
            total += parameter.numel()
            if owner not in pruned and not any(fnmatch(owner, glob) for glob in exclude):
                dense[name] = parameter.numel()
    names = dict.fromkeys(re.sub(r"(?<=\.)\d+(?![^.])", "*", name) for name in dense)
    return DenseWeights(sum(dense.values()) / total if total else 0.0, list(names))


def _modules_inside(model: nn.Module) -> set[int]:
    """The ids of the modules inside the repeated blocks."""
    return {id(module) for block in blocks(model) for module in block.modules()}


def _less_excluded(layers: list[Layer], exclude: Iterable[str]) -> list[Layer]:
    """The layers whose name matches none of the globs; each glob must match one."""
    excluded: set[str] = set()
    for glob in exclude:
        matched = {layer.name for layer in layers if fnmatch(layer.name, glob)}
        if not matched:
            raise PermpruneError(f'--exclude "{glob}" matches no layer that would be pruned, such as {layers[0].name}')
        excluded |= matched
    return [layer for layer in layers if layer.name not in excluded]


def require_changeable(model: nn.Module) -> None:
    """Raise `PermpruneError` for a model whose weights are packed or quantized, so that nothing can change them."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise PermpruneError(
            "the weights are packed or quantized: unpack them first (permprune unpack), or give the original model"
        )


def require_finite(layer: Layer) -> None:
    """Raise `PermpruneError` when the layer's weight holds NaN or infinity."""
    if not torch.isfinite(layer.weight).all():
        raise PermpruneError(f"{layer.name} holds NaN or infinite weights: repair the checkpoint before pruning")


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(m, (nn.Linear, Conv1D)) for m in module.modules())


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter -> the first name of the same tensor (tied weights share one)."""
    first: dict[Any, str] = {}
    return {
        name: first.setdefault(_identity(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _identity(parameter: Tensor) -> Any:
    if parameter.numel() == 0 or parameter.device.type == "meta":
        return id(parameter)
    return (parameter.device, parameter.data_ptr(), parameter.shape, parameter.stride(), parameter.dtype)
