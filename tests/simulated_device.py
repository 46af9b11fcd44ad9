"""A simulated accelerator: tensors report the device "simulated:0", but live on the CPU and are computed there.

    with simulated_device():
        model.to(SIMULATED)
        model(ids.to(SIMULATED), use_cache=False).logits.cpu()

As with CUDA, operators on tensors of both devices raise, except copies, numbers in CPU tensors without dimensions, and
indexing with indices on the CPU. Random numbers from a generator of the CPU and conversions to NumPy raise, too.

The bytes of its tensors are counted, as the allocator of CUDA counts them, and beyond a limit it raises as that does:

    with allocated(limit=2**20) as device:
        ...
    device.peak

Not simulated: `torch.export`, and `torch.tensor` with a device, which does not call Python.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
except ImportError:
    pytest.skip("this release of torch knows no devices written in Python", allow_module_level=True)


class Module:
    """What `torch.simulated` is: other tests in this process see no device, so that nothing chooses it by itself."""

    def is_available(self) -> bool:
        return False

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 0

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]


_setup_privateuseone_for_python_backend("simulated", Module())

SIMULATED, CPU = torch.device("simulated:0"), torch.device("cpu")

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Allocated:
    """The bytes of the device's tensors that live: `now`, and as `peak` the most at a time since `begin`.

    A tensor that would need more than `limit` bytes in all raises `torch.OutOfMemoryError`.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.limit: int | None = None
        self._sizes: dict[int, int] = {}

    def begin(self) -> None:
        """Begin to measure a peak."""
        self.peak = self.now

    def add(self, values: Tensor) -> None:
        """Count a tensor of the device, unless it shares the memory of one that is counted."""
        storage = values.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if values.is_meta or key in self._sizes:
            return
        if self.limit is not None and self.now + size > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes: {self.now} are in use.")
        self._sizes[key] = size
        weakref.finalize(storage, self._drop, key)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


MEMORY = Allocated()
"""The memory of the device."""


class SimulatedTensor(torch.Tensor):
    """A tensor of the simulated device; `values` is the tensor on the CPU that holds its values."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, requires_grad: bool = False) -> SimulatedTensor:
        if values.is_meta:  # accelerate makes parameters of the class that they had
            return torch.nn.Parameter(values, requires_grad)
        if isinstance(values, SimulatedTensor):
            values = values.values
        MEMORY.add(values)
        with torch.inference_mode(False):  # PyTorch refuses views that are inference tensors while their base is none
            tensor: SimulatedTensor = torch.Tensor._make_wrapper_subclass(
                cls,
                values.size(),
                strides=values.stride(),
                storage_offset=values.storage_offset(),
                dtype=values.dtype,
                device=SIMULATED,
                requires_grad=requires_grad,
            )
        tensor.values = values
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(operator, *args, **(kwargs or {}))

    @property
    def data(self) -> Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other: SimulatedTensor) -> None:
        torch.Tensor.data.__set__(self, other)
        self.values = other.values

    def __repr__(self) -> str:
        return f"SimulatedTensor({self.values})"

    def tolist(self) -> Any:
        return self.values.tolist()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.values.untyped_storage()


def _call(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute an operator on the CPU; the result is on the simulated device if its inputs or `device` are."""
    found: list[Any] = []
    plain = _unwrap(args, found)
    options = {name: _unwrap(value, found) for name, value in kwargs.items()}
    tensors = [value for value in found if isinstance(value, Tensor)]
    own = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    devices = [value for value in found if isinstance(value, torch.device)]
    if devices:
        simulated = devices[0].type == SIMULATED.type
    elif operator in INDEXING or operator is aten.copy_.default:
        simulated = isinstance(args[0], SimulatedTensor)
    else:
        simulated = bool(own)
    if len(own) < len(tensors) and own and operator not in COPIES:
        _require_one_device(operator, args, tensors)
    if simulated and (generator := kwargs.get("generator")) is not None:
        raise RuntimeError(f"{operator}: a generator on {generator.device} for a tensor on {SIMULATED}")
    result = operator(*plain, **options)
    return _wrap(result, {id(tensor.values): tensor for tensor in own}) if simulated else result


def _unwrap(value: Any, found: list[Any]) -> Any:
    """Replace tensors and devices in a value by those of the CPU; the former are added to `found`."""
    if isinstance(value, (list, tuple)):
        return type(value)(_unwrap(item, found) for item in value)
    if isinstance(value, (Tensor, torch.device)):
        found.append(value)
    if isinstance(value, SimulatedTensor):
        return value.values
    if value == SIMULATED:
        return CPU
    return value


def _wrap(value: Any, known: Mapping[int, SimulatedTensor]) -> Any:
    """Put the tensors in a value on the simulated device; operators in place return an argument, which is `known`."""
    if isinstance(value, (list, tuple)):
        return type(value)(_wrap(item, known) for item in value)
    if isinstance(value, Tensor):
        return known[id(value)] if id(value) in known else SimulatedTensor(value)
    return value


def _require_one_device(operator: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Raise `RuntimeError` if CUDA refuses this operator on these tensors of both devices."""
    if operator in INDEXING and isinstance(args[0], SimulatedTensor):
        tensors = [value for value in args[2:] if isinstance(value, Tensor)]  # not the indices
    if any(not isinstance(tensor, SimulatedTensor) and tensor.dim() for tensor in tensors):
        raise RuntimeError(f"{operator}: expected all tensors on one device, found {SIMULATED} and cpu")


_LIBRARY = torch.library.Library("_", "IMPL")  # registrations end with the object
_LIBRARY.fallback(_call, "PrivateUse1")  # for operators that create tensors on the device


@contextmanager
def simulated_device() -> Iterator[None]:
    """Context manager in which models can be moved to the device."""
    torch.__future__.set_swap_module_params_on_conversion(True)  # else tied parameters are no longer tied
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@contextmanager
def allocated(limit: int | None = None) -> Iterator[Allocated]:
    """Context manager: the device has `limit` bytes; yields its memory, whose peak begins here."""
    MEMORY.begin()
    MEMORY.limit = limit
    try:
        yield MEMORY
    finally:
        MEMORY.limit = None
