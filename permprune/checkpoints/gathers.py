"""Gathers: permutations of channels applied at run time because they cannot be folded into the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from permprune.checkpoints.schema import Malformed
from permprune.errors import PermpruneError
from permprune.models.experts import is_experts
from permprune.models.layers import linears_of
from permprune.system.device import compute_device

Side = Literal["output", "input"]
Place = tuple[Side, str]
"""The side ("output" or "input") and the name of a module whose channels are reordered."""

BUFFERS: dict[Side, str] = {"output": "permprune_output_order", "input": "permprune_input_order"}
"""Names of the module buffers that hold the permutations; as buffers, they move between devices with the model."""


class Permutation:
    """The set of permutations: non-empty lists of length n that contain each of 0 to n - 1 once."""

    def __contains__(self, order: list[int]) -> bool:
        return bool(order) and sorted(order) == list(range(len(order)))

    def __str__(self) -> str:
        return "a permutation"


Order = Annotated[list[int], Permutation()]


@dataclasses.dataclass(frozen=True)
class Gather:
    """A permutation of the channels of one module's output, or of the inputs of several modules.

    Channel i of the reordered tensor is channel `order[i]` of the original one. `site` is the name of the tensor's
    `Site`. Either `output` names a module or `inputs` names one or more; the other is empty. Raises `Malformed`
    otherwise.
    """

    site: str
    output: str
    inputs: list[str]
    order: Order

    def __post_init__(self) -> None:
        if bool(self.output) == bool(self.inputs) or not all(self.inputs):
            raise Malformed("it must name either an output or inputs")

    @property
    def places(self) -> list[Place]:
        """The places at which the permutation is applied."""
        return [("output", self.output)] if self.output else [("input", name) for name in self.inputs]


def compose(first: Iterable[Gather], then: Iterable[Gather]) -> list[Gather]:
    """Combine two lists of gathers, applied one after the other, into one with a single permutation per place."""
    orders: dict[Place, tuple[str, tuple[int, ...]]] = {}
    for gather in (*first, *then):
        for place in gather.places:
            _, before = orders.get(place, ("", range(len(gather.order))))
            orders[place] = gather.site, tuple(before[channel] for channel in gather.order)
    outputs = [
        Gather(site, name, [], list(order)) for (side, name), (site, order) in orders.items() if side == "output"
    ]
    readers: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (side, name), reordered in orders.items():
        if side == "input":
            readers.setdefault(reordered, []).append(name)
    return outputs + [Gather(site, "", names, list(order)) for (site, order), names in readers.items()]


def attach_gathers(model: nn.Module, gathers: Sequence[Gather]) -> None:
    """Register hooks that reorder channels at run time, after any gathers already attached at the same places.

    The weights are not changed and must already match the permutations. From now on, `save_pretrained` of the model
    raises `PermpruneError`, because the saved weights would be wrong without the gathers; copies and pickles of the
    model keep the gathers and raise too. Raises `Malformed` if the model has no such place, or one of another size.
    """
    device = compute_device(model)
    for gather in gathers:
        for side, name in gather.places:
            _attach(_module(model, side, name), side, name, torch.tensor(gather.order).to(device))
    for module in model.modules() if gathers else ():
        if isinstance(module, PreTrainedModel):
            vars(module)["save_pretrained"] = _refuse_to_save


def gather_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the permutations of the gathers that are attached to a model, by the names of their buffers."""
    every = model.named_buffers(remove_duplicate=False)
    return {name: order for name, order in every if name.endswith(tuple(BUFFERS.values()))}


def attached_orders(model: nn.Module) -> dict[Place, Tensor]:
    """Return the permutations of the gathers that are attached to a model, by place."""
    sides = {buffer: side for side, buffer in BUFFERS.items()}
    orders = [(name.rpartition("."), order) for name, order in gather_buffers(model).items()]
    return {(sides[buffer], module): order for (module, _, buffer), order in orders}


def detach_gathers(model: nn.Module) -> dict[Place, Tensor]:
    """Remove the gathers, without which the weights compute other outputs, and return their permutations by place."""
    orders = attached_orders(model)
    for side, name in orders:
        module = model.get_submodule(name)
        del module._buffers[BUFFERS[side]]
        hooks: Any = module._forward_hooks if side == "output" else module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook in (_reorder_output, _reorder_input)]:
            del hooks[key]
    for module in model.modules():
        vars(module).pop("save_pretrained", None)
    return orders


def _attach(module: nn.Module, side: Side, name: str, order: Tensor) -> None:
    before = module._buffers.get(BUFFERS[side])
    size = _width(module, side) if before is None else len(before)
    if size is not None and size != len(order):
        raise Malformed(f"the gather at the {side} of {name} has {len(order)} channels, the module {size}")
    if before is not None:
        module.register_buffer(BUFFERS[side], before[order], persistent=False)
        return
    module.register_buffer(BUFFERS[side], order, persistent=False)
    if side == "output":
        module.register_forward_hook(_reorder_output)
    else:
        module.register_forward_pre_hook(_reorder_input)


def _reorder_output(module: nn.Module, _args: object, result: Tensor) -> Tensor:
    return _reorder(result, getattr(module, BUFFERS["output"]))


def _reorder_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (_reorder(args[0], getattr(module, BUFFERS["input"])), *args[1:])


def _reorder(tensor: Tensor, order: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.shape[-1] != len(order):
        raise PermpruneError(f"a gather of {len(order)} channels does not fit what it reads: prune the model again")
    return tensor.index_select(-1, order)


def _module(model: nn.Module, side: Side, name: str) -> nn.Module:
    """The module of that name.

    Raises `Malformed` unless it is a linear layer or experts ("input"), or a leaf module ("output").
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise Malformed(f"the model has no module {name!r}, where a gather should be") from None
    reads = isinstance(module, (nn.Linear, Conv1D)) or is_experts(module)
    fits = reads if side == "input" else not any(module.children())
    if not fits:
        raise Malformed(f"a gather cannot be at the {side} of {name}")
    return module


def _width(module: nn.Module, side: Side) -> int | None:
    """The number of input or output channels of a linear layer, an embedding or a norm, or of the inputs of experts.

    None for other modules.
    """
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if is_experts(module):
        return linears_of("", module)[0].weight.shape[1] if side == "input" else None
    weight = getattr(module, "weight", None)
    elsewhere = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU)  # their channels are not the last dimension
    if not isinstance(weight, Tensor) or isinstance(module, elsewhere):
        return None
    if isinstance(module, (nn.Linear, Conv1D)):
        rows_read = isinstance(module, Conv1D) == (side == "input")
        return weight.shape[0 if rows_read else 1]
    return len(weight) if weight.dim() == 1 else None


def _refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    raise PermpruneError(
        "this model reorders channels at run time, which save_pretrained does not store: "
        "write it with permprune.save(model, folder), or Pruned.save_pretrained (after permprune.load, if "
        "Transformers loaded it)"
    )
