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

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

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
WORK = {
    aten.mm.default: lambda args: 2 * args[0].numel() * args[1].shape[-1],
    aten.addmm.default: lambda args: 2 * args[1].numel() * args[2].shape[-1],
    aten.linalg_cholesky_ex.default: lambda args: args[0].shape[-1] ** 3 / 3,
    aten.cholesky_inverse.default: lambda args: args[0].shape[-1] ** 3,
}
"""The floating-point operations of products and factors of matrices."""

INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Allocated:
    """The bytes of the device's tensors that live: `now`, and as `peak` the most at a time since `begin`.

    A tensor that would need more than `limit` bytes in all raises `torch.OutOfMemoryError`. Products of matrices that
    take more than `computed` floating-point operations are left out: they have the memory of their results, zeros.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.limit: int | None = None
        self.computed = math.inf
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
    if (work := WORK.get(operator)) is not None and work(plain) > MEMORY.computed:
        result = _left_out(operator, plain, options)
    else:
        result = operator(*plain, **options)
    return _wrap(result, {id(tensor.values): tensor for tensor in own}) if simulated else result


def _left_out(operator: Any, args: Any, kwargs: Any) -> Any:
    """Zeros in place of what an operator would compute."""
    described = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    return tree_map_only(
        Tensor, lambda tensor: torch.zeros_like(tensor, device=CPU), operator(*described[0], **described[1])
    )


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


def _autocast(operator: Any, dtype: torch.dtype | None) -> Any:
    """An operator inside autocast: its inputs are converted to this type, by default that of the context."""

    def run(*args: Any, **kwargs: Any) -> Any:
        chosen = dtype or torch.get_autocast_dtype(SIMULATED.type)

        def converted(value: Any) -> Any:
            found = isinstance(value, Tensor) and value.device.type == SIMULATED.type and value.is_floating_point()
            return value.to(chosen) if found else value

        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return operator(*map(converted, args), **{name: converted(value) for name, value in kwargs.items()})

    return run


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention that holds no scores of all pairs, as the kernels of GPUs do."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # the fused kernel adds masks
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
    fused = aten._scaled_dot_product_flash_attention_for_cpu
    result: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return result


AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
NARROW = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
WIDE = ("softmax.int", "log_softmax.int", "cross_entropy_loss", "nll_loss_nd", "mse_loss", "layer_norm", "rsqrt")
"""Operators that autocast computes in the narrower type, and in fp32; others as their inputs are."""

_LIBRARY = torch.library.Library("_", "IMPL")  # registrations end with the object
_LIBRARY.fallback(_call, "PrivateUse1")  # for operators that create tensors on the device
_LIBRARY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_ATEN = torch.library.Library("aten", "IMPL")
for _key in ("PrivateUse1", "AutogradPrivateUse1"):
    _ATEN.impl("scaled_dot_product_attention", _attention, _key)
for _name, _dtype in [*((name, None) for name in NARROW), *((name, torch.float32) for name in WIDE)]:
    _packet, _, _overload = _name.partition(".")
    _operator = getattr(getattr(aten, _packet), _overload or "default")
    _ATEN.impl(_name, _autocast(_operator, _dtype), "AutocastPrivateUse1")


@contextmanager
def simulated_device() -> Iterator[None]:
    """Context manager in which models can be moved to the device."""
    torch.__future__.set_swap_module_params_on_conversion(True)  # else tied parameters are no longer tied
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@contextmanager
def allocated(limit: int | None = None, computed: float = math.inf) -> Iterator[Allocated]:
    """Context manager: the device has `limit` bytes; yields its memory, whose peak begins here (`Allocated`)."""
    MEMORY.begin()
    MEMORY.limit, MEMORY.computed = limit, computed
    try:
        yield MEMORY
    finally:
        MEMORY.limit, MEMORY.computed = None, math.inf
