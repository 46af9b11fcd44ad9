"""The bytes of the tensors that live at a time."""

import weakref
from typing import Any, Self

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from permprune.kernels.product.native import aligned


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that operations inside make and that live: `peak` is the most at a time.

    Kernels get new memory for each call: what they keep between calls may be from a larger product of an earlier test.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> Self:
        self.patch.setattr("permprune.kernels.product.native.workspace", lambda size, of="lines": aligned(size))
        entered: Self = super().__enter__()
        return entered

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patch.undo()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._drop, storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
        return result

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
