"""Activation functions and RMS norms on native kernels, beside the modules of Transformers in float64."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import activations
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

from permprune.kernels import library
from permprune.kernels.elementwise.module import ACTIVATIONS, NativeLayer, restore_layers, use_native_layers

GELUS = nn.GELU, activations.GELUActivation
KINDS: list[Callable[[], nn.Module]] = [*ACTIVATIONS, nn.GELU, partial(nn.GELU, "tanh")]
NORMS = [LlamaRMSNorm, GemmaRMSNorm, T5LayerNorm]
ERRORS = {torch.float32: 2e-6, torch.bfloat16: 2**-8 * 1.1}
"""Relative errors; that of bf16 is half of its last bit, and what the kernels add to it."""

small = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)


def native(made: nn.Module) -> nn.Module:
    use_native_layers(made)
    assert isinstance(made, NativeLayer)
    return made


def normal(kind: type[nn.Module], width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    norm: Any = kind(width)
    norm.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    return norm.to(dtype)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of magnitudes from 0.001 to 100."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10 ** (5 * torch.rand(shape, generator=generator) - 3)


@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize("kind", KINDS)
@small
@given(shape=st.lists(st.integers(0, 40), max_size=3), seed=st.integers(0, 99))
def test_activations_are_those_of_float64(
    kernel: str, kind: Callable[[], nn.Module], dtype: torch.dtype, shape: list[int], seed: int
) -> None:
    x = drawn(*shape, seed=seed).to(dtype)
    with torch.inference_mode():
        found = native(kind())(x)
    assert found.dtype == dtype and found.shape == x.shape
    if kernel == "torch" or (kind in GELUS and dtype == torch.float32):
        assert torch.equal(found, kind()(x))
    else:
        least = 2e-4 if kind in GELUS else 1e-6  # GELU is 0 below -4
        torch.testing.assert_close(found.double(), kind()(x.double()), rtol=ERRORS[dtype], atol=least)


@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize("kind", NORMS)
@small
@given(rows=st.integers(0, 9), width=st.integers(1, 150), seed=st.integers(0, 99))
def test_norms_are_those_of_float64(
    kernel: str, kind: type[nn.Module], dtype: torch.dtype, rows: int, width: int, seed: int
) -> None:
    norm, x = normal(kind, width, dtype, seed), drawn(2, rows, width, seed=seed).to(dtype)
    exact = x * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
    with torch.inference_mode():
        found = native(norm)(x)
    assert found.dtype == dtype
    shift = float(kind is GemmaRMSNorm)
    worst = 4 * ERRORS[dtype] if kernel == "torch" else ERRORS[dtype]
    torch.testing.assert_close(found.double(), exact * (norm.weight.double() + shift), rtol=worst, atol=1e-6)


@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_not_finite_or_very_large(
    kernel: str, kind: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    large = torch.tensor([torch.inf, torch.nan, 1e30, -1e30] * 8 + [1.0, -torch.inf]).to(dtype)
    with torch.inference_mode():
        found = native(kind())(large)
    native_here = kernel != "torch" and (kind not in GELUS or dtype == torch.bfloat16)
    expected = kind()(large.double()).to(dtype) if native_here else kind()(large)
    torch.testing.assert_close(found, expected, equal_nan=True)
    with torch.inference_mode():
        rows = native(normal(LlamaRMSNorm, 34, dtype))(torch.stack([large, torch.ones(34).to(dtype)]))
    assert rows[0].isnan().all() and rows[1].isfinite().all()


@pytest.mark.parametrize("made", [activations.GELUTanh, lambda: normal(LlamaRMSNorm, 64)])
@pytest.mark.parametrize("case", ["gradient", "float16", "strides", "compiled", "traced"])
def test_other_calls_compute_what_the_module_does(
    made: Callable[[], nn.Module], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = made().requires_grad_(False)
    x = drawn(64, 64).half() if case == "float16" else drawn(64, 64)
    x = x.T if case == "strides" else x.requires_grad_(case == "gradient")
    expected, run = layer(x), native(layer)
    monkeypatch.setattr(library, "require", lambda: pytest.fail("the native library was called"))
    if case == "compiled":
        run = torch.compile(layer, backend="eager", fullgraph=True)
    elif case == "traced":
        with pytest.deprecated_call():
            run = torch.jit.trace(layer, drawn(64, 64, seed=1), check_trace=False)  # type: ignore[no-untyped-call]
    found = run(x)
    assert torch.equal(found, expected) and found.requires_grad == (case == "gradient")


def test_a_weight_that_is_trained_gets_its_gradient() -> None:
    norm: Any = native(normal(LlamaRMSNorm, 64))
    norm(drawn(3, 64)).sum().backward()
    assert norm.weight.grad.norm() > 0


class Squared(nn.Module):
    """What has the parts of an RMS norm and computes something else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().sum(-1, keepdim=True) + self.eps).sqrt()


@pytest.mark.parametrize(
    "other",
    [
        Squared(8),
        Qwen3NextRMSNormGated(8),
        nn.LayerNorm(8, bias=False),
        nn.SiLU(inplace=True),
        nn.Embedding(3, 8),
    ],
)
def test_other_modules_stay_as_they_are(other: nn.Module) -> None:
    use_native_layers(other)
    assert not isinstance(other, NativeLayer)


def test_a_model_keeps_its_modules_and_gets_them_back() -> None:
    model: Any = nn.Sequential(normal(LlamaRMSNorm, 8), nn.SiLU(), normal(GemmaRMSNorm, 8, seed=1))
    parts, x, called = [*model], drawn(3, 8), []
    model[1].register_forward_hook(lambda *_: called.append(1))
    expected, shown, kinds = model(x), repr(model), [type(part) for part in model]
    native(model[0])
    use_native_layers(model)
    use_native_layers(model)
    assert [*model] == parts and all(isinstance(part, NativeLayer) for part in model)
    assert repr(model) == shown and isinstance(model[0], LlamaRMSNorm)
    copied = copy.deepcopy(model)
    model[0].weight.data.zero_()
    read = pickle.loads(pickle.dumps(copied[0]))
    with torch.inference_mode():
        torch.testing.assert_close(copied(x), expected)
        torch.testing.assert_close(read(x), copied[0](x))
        assert not model[0](x).any()
    assert len(called) == 2  # a copy has no less of the hooks
    restore_layers(model)
    assert [type(part) for part in model] == kinds


def test_the_library_checks_what_it_gets() -> None:
    functions, index = library.require()
    x = torch.ones(4)
    for count, number in ((-1, 0), (4, 2), (4, 9)):
        assert functions.permprune_activate(x.data_ptr(), x.data_ptr(), count, 1.0, 0.0, 0, number, index, 1) == 5
    assert functions.permprune_activate(None, x.data_ptr(), 4, 1.0, 0.0, 0, 0, index, 1) == 5
    assert functions.permprune_activate(x.data_ptr(), x.data_ptr(), 4, 0.0, 0.0, 1, 0, index, 1) == 5  # GELU in fp32
    for rows, width, number in ((-1, 4, 0), (1, 2**40, 0), (1, 4, 3)):
        given = x.data_ptr(), x.data_ptr(), x.data_ptr(), rows, width, 1e-6, 0.0, number, index, 1
        assert functions.permprune_normalize(*given) == 5
