"""Models whose linear layers and embeddings hold only some of their rows; each process holds others.

A linear layer computes the outputs of its own rows, and the outputs of all processes are put together, so that the next
module reads the whole tensor. In the backward pass the gradients of the inputs are summed (Shoeybi et al. 2019, arXiv
1909.08053, section 3, the column-parallel layer with gathered outputs). Weights are never exchanged. All processes run
the same batches at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.models.layers import ROWS, Layer
from permprune.system import sharding
from permprune.system.distributed import shards

ReadRows = Callable[[str, slice], Tensor]
"""(name of a parameter, rows) -> these rows of it, fp32."""


def require_divisible(layers: Iterable[Layer], processes: int) -> None:
    """Raise `PermpruneError` unless the rows of all layers can be divided among so many processes."""
    for layer in layers:
        if type(layer.module) is not nn.Linear:
            kind = "experts" if layer.expert is not None else type(layer.module).__name__
            raise PermpruneError(f"{layer.name} belongs to {kind}, whose rows cannot be divided among processes")
        if not sharding.leaves_none_out(len(layer.weight), processes):
            raise PermpruneError(f"{layer.name} has {len(layer.weight)} rows for {processes} processes: use fewer")


def load_rows(model: nn.Module, read: ReadRows) -> None:
    """Give a model on the meta device its weights: of linear layers and embeddings the rows of this process.

    Other parameters, and those that other modules use as well, are held whole. Raises whatever `read` raises.
    """
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module, _, parameter in _parameters(model):
        owners.setdefault(parameter, []).append(module)
    divided = {one for one, users in owners.items() if all(map(_is_divisible, users))}
    divided = {one for one in divided if sharding.leaves_none_out(len(one), shards())}
    loaded: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in model.named_modules():
        if _is_divisible(module) and module.weight in divided:
            _divide(module, len(module.weight))  # type: ignore[arg-type]
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in loaded:
                    rows = sharding.own_rows(len(parameter)) if parameter in divided else slice(None)
                    own = read(f"{name}.{attribute}".removeprefix("."), rows)
                    loaded[parameter] = nn.Parameter(own, requires_grad=False)
                module._parameters[attribute] = loaded[parameter]


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter


def _is_divisible(module: nn.Module) -> bool:
    """Whether a module only multiplies by its weight, or looks rows up; subclasses may do something else."""
    return type(module) in (nn.Linear, nn.Embedding)


def _divide(module: nn.Linear | nn.Embedding, rows: int) -> None:
    """Let a module that has `rows` rows run with those of this process."""
    setattr(module, ROWS, (sharding.own_rows(rows), rows))
    if isinstance(module, nn.Linear):
        module.register_forward_pre_hook(lambda _, args: (_Copied.apply(args[0]), *args[1:]))  # type: ignore[no-untyped-call]
        module.register_forward_hook(lambda _, __, output: _Gathered.apply(output, rows))  # type: ignore[no-untyped-call]
        return
    module.padding_idx = None  # it only matters to gradients, and may be the row of another process
    own, elsewhere = sharding.own_rows(rows), list[Tensor]()

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids = args[0] - own.start
        elsewhere.append((ids < 0) | (ids >= own.stop - own.start))
        return (ids.masked_fill(elsewhere[-1], 0), *args[1:])

    def leave(_: nn.Module, _args: Any, output: Tensor) -> Tensor:
        found = output.masked_fill(elsewhere.pop()[..., None], 0)
        sharding.add_(found)
        return found

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


class _Copied(torch.autograd.Function):
    """The input, which all processes have; its gradient is the sum of those with respect to each process's outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        sharding.add_(total)
        return total


class _Gathered(torch.autograd.Function):
    """The outputs of all rows, given those of the own ones; all processes compute the same gradient of them."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, rows: int) -> Tensor:
        ctx.rows = rows
        return sharding.gather(output, rows, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][..., sharding.own_rows(ctx.rows)], None
