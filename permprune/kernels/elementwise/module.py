"""Activation functions and RMS norms of a model on native kernels, for inference on a CPU.

PyTorch computes GELU's approximations slowly, and Transformers RMS norms in passes of their own over the activations
(`benchmarks/elementwise.py`). The kernels compute in fp32 and round once, to the type of the activations.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import activations

from permprune.kernels import library

LOGISTIC, QUICK = (1.0, 0.0, 0), (1.702, 0.0, 0)
TANH = (math.sqrt(8 / math.pi), 0.044715 * math.sqrt(8 / math.pi), 0)
"""The linear and the cubic term of p in x / (1 + exp(-p(x))); 1 + tanh(p / 2) is twice the logistic function of p."""

NORMAL = (0.0, 0.0, 1)
"""x times the normal distribution function of x: GELU; in bf16, as PyTorch is as fast in fp32."""

ACTIVATIONS: dict[type[nn.Module], tuple[float, float, int]] = {
    activations.GELUActivation: NORMAL,
    nn.SiLU: LOGISTIC,
    activations.SiLUActivation: LOGISTIC,
    activations.QuickGELUActivation: QUICK,
    activations.GELUTanh: TANH,
    activations.NewGELUActivation: TANH,
    activations.FastGELUActivation: TANH,
    activations.AccurateGELUActivation: TANH,
}

EPSILONS = "variance_epsilon", "eps", "epsilon"
"""The attributes in which RMS norms keep what they add to the mean of the squares."""

SHIFTS = 0.0, 1.0
"""What is added to the weight of an RMS norm: Gemma's are centred at 0."""


class NativeLayer(nn.Module):
    """A layer that computes natively: the first base of a class whose second is what the layer was.

    It is a class, not a `forward` of the instance, as Transformers removes those wherever it looks for kernels.
    """

    _native: ClassVar[tuple[type[nn.Module], Callable[..., Tensor], tuple[float, ...]]]
    """What the layer was, the function that computes it, and the function's numbers."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for activations x, of the same shape."""
        _, compute, form = self._native
        return compute(self, *form, x)

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, self._native, self.__dict__


def use_native_layers(model: nn.Module) -> None:
    """Compute the activation functions and RMS norms of a model natively, in place; parameters, hooks and names stay.

    With gradients, under `torch.compile`, in other types than fp32 and bf16, and on other devices than the CPU, they
    compute what they did before.
    """
    shifts: dict[tuple[Any, ...], float | None] = {}
    for module in model.modules():
        kind: Any = type(module)
        if issubclass(kind, NativeLayer):
            continue
        if (form := _form_of(module)) is not None:
            module.__class__ = _native_kind(kind, _activate, form)
        elif (epsilon := _epsilon_of(module)) is not None:
            if (kind, epsilon) not in shifts:
                shifts[kind, epsilon] = next(_shifts_of(module, epsilon), None)
            if (shift := shifts[kind, epsilon]) is not None:
                module.__class__ = _native_kind(kind, _normalize, (epsilon, shift))


def restore_layers(model: nn.Module) -> None:
    """Undo `use_native_layers`."""
    for module in model.modules():
        if isinstance(module, NativeLayer):
            module.__class__ = module._native[0]  # type: ignore[assignment]


@cache
def _native_kind(kind: Any, compute: Callable[..., Tensor], form: tuple[float, ...]) -> type[Any]:
    named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (NativeLayer, kind), {**named, "_native": (kind, compute, form)})


def _blank(*native: Any) -> nn.Module:
    """Return a native layer without its attributes, to unpickle or copy one."""
    layer: nn.Module = object.__new__(_native_kind(*native))
    return layer


def _activate(module: Any, linear: float, cubic: float, normal: int, x: Tensor) -> Tensor:
    if not _is_native(x) or (normal and x.dtype != torch.bfloat16):
        return super(NativeLayer, module).forward(x)  # type: ignore[no-any-return]
    functions, index = library.require()
    y, count = torch.empty_like(x), x.numel()
    number, threads = library.NUMBERS[x.dtype], library.threads(count)
    given = x.data_ptr(), y.data_ptr(), count, linear, cubic, normal, number, index, threads
    library.require_done(functions.permprune_activate(*given), "an activation function")
    return y


def _normalize(module: Any, epsilon: float, shift: float, x: Tensor) -> Tensor:
    weight: Tensor = module._parameters["weight"]
    if not (_is_native(x) and _is_weight(weight, x)):
        return super(NativeLayer, module).forward(x)  # type: ignore[no-any-return]
    functions, index = library.require()
    y, count = torch.empty_like(x), x.numel()
    sizes, number, threads = (count // len(weight), len(weight)), library.NUMBERS[x.dtype], library.threads(count)
    given = x.data_ptr(), weight.data_ptr(), y.data_ptr(), *sizes, epsilon, shift, number, index, threads
    library.require_done(functions.permprune_normalize(*given), "an RMS norm")
    return y


def _form_of(module: nn.Module) -> tuple[float, float, int] | None:
    """Return the form of an activation function that the native library computes."""
    if type(module) is nn.GELU:
        return TANH if module.approximate == "tanh" else NORMAL
    return None if getattr(module, "inplace", False) else ACTIVATIONS.get(type(module))


def _is_native(x: Tensor) -> bool:
    """Whether the native library computes a function of these activations."""
    graph = torch.is_grad_enabled() and x.requires_grad
    fits = type(x) is Tensor and x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous()
    return fits and not graph and not library.is_traced() and library.available()


def _is_weight(weight: Tensor, x: Tensor) -> bool:
    """Whether the native library reads this as the weight of a norm of x."""
    fits = weight.dtype == x.dtype and weight.shape == x.shape[-1:] and weight.is_contiguous() and weight.is_cpu
    return fits and not (torch.is_grad_enabled() and weight.requires_grad)


def _epsilon_of(module: nn.Module) -> float | None:
    """Return the epsilon of a module that may be an RMS norm: its only tensor is a vector, its weight."""
    tensors = {**module._parameters, **module._buffers}
    weight = tensors.get("weight")
    if len(tensors) != 1 or weight is None or weight.dim() != 1 or weight.is_meta or module._modules:
        return None
    epsilons = [getattr(module, name, None) for name in EPSILONS]
    return next((epsilon for epsilon in epsilons if isinstance(epsilon, float)), None)


@torch.no_grad()
def _shifts_of(module: nn.Module, epsilon: float) -> Iterator[float]:
    """Yield the `SHIFTS` with which a module is an RMS norm: it is tried on activations of several magnitudes."""
    exact: Any = copy.deepcopy(module).float().cpu()
    drawn = torch.randn(6, len(exact.weight), generator=torch.Generator().manual_seed(0))
    exact.weight.copy_(drawn[0])
    x = drawn[1:] * torch.logspace(-4, 2, 5)[:, None]
    try:
        result, rounded = type(module).forward(exact, x), type(module).forward(exact.bfloat16(), x.bfloat16())
    except (RuntimeError, TypeError, ValueError):  # it reads something else
        return
    if not isinstance(result, Tensor) or result.shape != x.shape or rounded.dtype != torch.bfloat16:
        return
    normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    for shift in SHIFTS:
        if torch.allclose(result, normal * (drawn[0] + shift), rtol=1e-4, atol=1e-6):
            yield shift
