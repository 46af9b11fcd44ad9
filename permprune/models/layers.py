"""The layers to prune (the linears inside a model's repeated blocks) and the weights that stay dense there."""

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
"""Maximum number of names of dense weights in a warning."""


@dataclass(frozen=True)
class Layer:
    """A linear layer y = x W^T.

    `name` is the name of its module and `parameter` the name of its weight, as in `named_parameters()`. `transposed` is
    True if the module stores the weight as (inputs, outputs), as `Conv1D` does.
    """

    name: str
    module: nn.Module
    transposed: bool = False

    @property
    def parameter(self) -> str:
        """The name of the weight in `named_parameters()`."""
        return f"{self.name}.weight"

    @property
    def weight(self) -> Tensor:
        """The weight as (rows, channels) = (outputs, inputs); it shares memory with the parameter."""
        stored: Tensor = self.module.weight.data  # type: ignore[union-attr,assignment]
        return stored.T if self.transposed else stored


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks, in order.

    These are the elements of the outermost `ModuleList`s and `Sequential`s that have at least two elements, each of
    which contains a linear.
    """
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
    """Every linear inside the repeated blocks, except those whose name matches a glob of `exclude`.

    Embeddings, the output head and task heads are outside the blocks and stay dense, as in the literature (SparseGPT,
    Wanda). Raises `PermpruneError` if a glob matches no layer, if no layer is left, if M does not divide a layer's
    input width, if a weight contains NaN or infinity (not checked on the meta device), or if the weights are packed or
    quantized.
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
    """Weights inside the repeated blocks that stay dense although the user did not exclude them.

    `share` is their fraction of all weights inside the blocks. `layers` are the names of the parameters; names that
    differ only in numbers are merged into one, with * for the number.
    """

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

    Considered are all parameters with at least two dimensions except biases and embeddings: for example fused experts
    (3-D weights), their routers, and kernels of convolutions. Layers that match a glob of `exclude` are left out.
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
    """The layers whose name matches none of the globs. Raises `PermpruneError` if a glob matches no layer."""
    excluded: set[str] = set()
    for glob in exclude:
        matched = {layer.name for layer in layers if fnmatch(layer.name, glob)}
        if not matched:
            raise PermpruneError(f'--exclude "{glob}" matches no layer that would be pruned, such as {layers[0].name}')
        excluded |= matched
    return [layer for layer in layers if layer.name not in excluded]


def require_changeable(model: nn.Module) -> None:
    """Raise `PermpruneError` if the model's weights are packed or quantized, and so cannot be changed."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise PermpruneError(
            "the weights are packed or quantized: unpack them first (permprune unpack), or give the original model"
        )


def require_finite(layer: Layer) -> None:
    """Raise `PermpruneError` if the layer's weight contains NaN or infinity."""
    if not torch.isfinite(layer.weight).all():
        raise PermpruneError(f"{layer.name} holds NaN or infinite weights: repair the checkpoint before pruning")


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(m, (nn.Linear, Conv1D)) for m in module.modules())


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
