"""Constants of a trace: tensors that depend only on the inputs are computed while the model is traced.

The code of vision-language models reads sizes from its inputs (image grids, masks, positions of image tokens), which
`torch.export` cannot trace. These do not depend on the parameters, so that no permutation of channels changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes

from permprune.models.hooks import computing

_BUFFERS = frozenset({torch.empty, torch.full, torch.ones, torch.zeros})
"""Functions that make a constant if its values are integers; activations may be written into a floating-point one."""

_FACTORIES = _BUFFERS | {torch.arange, torch.as_tensor, torch.eye, torch.linspace, torch.tensor}
"""Functions that make a constant of no tensor."""


def constant_inputs(model: nn.Module, arguments: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Context manager: the model's forward takes no arguments, and runs on these with its constants computed."""
    forward = model.forward

    def closed() -> Any:
        with _Constants():
            return forward(**arguments)

    return computing({model: closed})


class _Constants(TorchFunctionMode):
    """Computes each function whose tensors are all constants: neither fake tensors, as in the trace, nor on meta."""

    def __init__(self) -> None:
        self._overwritten: list[Tensor] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = _pytree.arg_tree_leaves(*args, **kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if all(map(self._is_constant, leaves)) and (tensors or func in _FACTORIES):
            result = _compute(func, *args, **kwargs)
            buffer = func in _BUFFERS and result.is_floating_point()
            if tensors or (self._is_constant(result) and not buffer):
                return result
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], self._without_masks(args[1]), *args[2:])
        if tensors and _writes(func) and not isinstance(tensors[0], FakeTensor):
            self._overwritten.append(tensors[0])  # not a constant from now on
        return func(*args, **kwargs)

    def _is_constant(self, leaf: Any) -> bool:
        if isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool | FakeTensor):
            return False
        if not isinstance(leaf, Tensor):
            return True
        overwritten = (other.untyped_storage().data_ptr() for other in self._overwritten)
        return not leaf.is_meta and not any(leaf.untyped_storage().data_ptr() == memory for memory in overwritten)

    def _without_masks(self, index: Any) -> Any:
        """The index with every constant mask replaced by the positions at which it is true."""
        entries: list[Any] = []
        for entry in index if isinstance(index, tuple) else (index,):
            mask = isinstance(entry, Tensor) and entry.dtype == torch.bool and self._is_constant(entry)
            entries += _compute(torch.nonzero, entry, as_tuple=True) if mask else [entry]
        return tuple(entries)


def _compute(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of a function, outside the trace."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return func(*args, **kwargs)


def _writes(func: Callable[..., Any]) -> bool:
    """Whether a function writes into its first argument, by its name: `add_`, `__iadd__`, `__setitem__`."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
