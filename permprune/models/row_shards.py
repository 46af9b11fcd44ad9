"""Models whose linear layers and embeddings hold only some of their rows; each process holds others.

A linear layer computes the outputs of its own rows, and the outputs of all processes are put together, so that the next
module reads the whole tensor. In the backward pass the gradients of the inputs are summed (Shoeybi et al. 2019, arXiv
1909.08053, section 3, the column-parallel layer with gathered outputs). Weights are never exchanged. All processes run
the same batches at the same time.

What is exchanged follows from the layouts of `torch.distributed.tensor`. Parameters are plain tensors of a process's
rows, not DTensors as `parallelize_module` would make them: docs/architecture.md says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.models.layers import ROWS, Layer
from permprune.system import sharding
from permprune.system.device import compute_device
from permprune.system.distributed import shards
from permprune.system.imports import on_first_use

with on_first_use(globals()):  # some builds of torch lack them
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

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
    users: dict[Tensor, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, []).append(module)
    divisible = [module for module in model.modules() if _is_divisible(module)]
    divided = {
        module: len(module.weight)
        for module in divisible
        if all(map(_is_divisible, users[module.weight])) and sharding.leaves_none_out(len(module.weight), shards())
    }
    loaded: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter not in loaded:
                is_divided = divided.keys() >= {*users[parameter]}
                rows = sharding.local_rows(len(parameter)) if is_divided else slice(None)
                weight = read(f"{name}.{attribute}".removeprefix("."), rows)
                loaded[parameter] = nn.Parameter(weight, requires_grad=False)
            module._parameters[attribute] = loaded[parameter]
    mesh = init_device_mesh(compute_device(model).type, (shards(),))
    for divided_module, length in divided.items():
        _divide(divided_module, length, mesh)


def _is_divisible(module: nn.Module) -> TypeGuard[nn.Linear | nn.Embedding]:
    """Whether a module only multiplies by its weight, or looks rows up; subclasses may do something else."""
    return type(module) in (nn.Linear, nn.Embedding)


def _divide(module: nn.Linear | nn.Embedding, rows: int, mesh: DeviceMesh) -> None:
    """Let a module that has `rows` rows run with those of this process."""
    local = sharding.local_rows(rows)
    setattr(module, ROWS, (local, rows))
    if isinstance(module, nn.Linear):
        module.register_forward_pre_hook(lambda _, args: (_with_summed_gradient(args[0], mesh), *args[1:]))
        module.register_forward_hook(lambda _, __, output: _on_all(output, Shard(-1), rows, mesh))
        return
    module.padding_idx = None  # it only matters to gradients, and may be the row of another process
    elsewhere = list[Tensor]()

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids = args[0] - local.start
        elsewhere.append((ids < 0) | (ids >= local.stop - local.start))
        return (ids.masked_fill(elsewhere[-1], 0), *args[1:])

    def leave(_: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return _on_all(output.masked_fill(elsewhere.pop()[..., None], 0), Partial(), output.shape[-1], mesh)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _with_summed_gradient(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return a tensor that all processes have; its gradient is the sum of those of the processes."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _on_all(output: Tensor, placement: Placement, width: int, mesh: DeviceMesh) -> Tensor:
    """Return what outputs of processes are together, (..., width): their sum, or one beside the other.

    All processes compute the same gradient of it.
    """
    shape = torch.Size((*output.shape[:-1], width))
    stride = torch.empty(shape, device="meta").stride()
    parts = DTensor.from_local(output, mesh, [placement], run_check=False, shape=shape, stride=stride)
    return parts.redistribute(placements=[Replicate()]).to_local()
