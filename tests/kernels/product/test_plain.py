"""Layers that keep all weights, on the kernels of packed weights, against `nn.Linear`."""

import pytest
import torch
from torch import nn

from permprune.errors import PermpruneError
from permprune.kernels.product import native
from permprune.kernels.product.layout import LARGEST_BATCH
from permprune.kernels.product.plain import PlainLinear, plain_linear, use_kernels, use_pytorch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(128,), (3, 128), (2, 3, 128), (0, 128), (LARGEST_BATCH + 1, 128)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_pytorch(dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(128, 37, bias=bias).to(dtype)
    x = torch.randn(shape).to(dtype)
    expected = layer(x)
    use_kernels(layer)
    with torch.inference_mode():
        found = layer(x)
    assert type(layer) is PlainLinear and found.shape == expected.shape and found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-2 if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_more_rows_than_kernels_are_fast_for_go_to_pytorch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, most = nn.Linear(128, 37).to(dtype), native.most_plain(dtype)
    few, many = torch.randn(most, 128).to(dtype), torch.randn(most + 1, 128).to(dtype)
    expected = layer(many)
    use_kernels(layer)
    products = []
    monkeypatch.setattr(native, "multiply", lambda weights, x: products.append(len(x)) or x.new_zeros(len(x), 37))
    with torch.inference_mode():
        assert torch.equal(layer(many), expected)
        layer(few)
    assert products == [most]


def test_widths_that_the_kernels_lack_and_gradients_go_to_pytorch() -> None:
    narrow, x = nn.Linear(100, 8), torch.randn(2, 100)
    expected = narrow(x)
    use_kernels(narrow)
    assert torch.equal(narrow(x), expected) and narrow(x).requires_grad
    with torch.no_grad():
        assert torch.equal(narrow(x), expected)
    wide = nn.Linear(128, 8)
    use_kernels(wide)
    wide(torch.randn(1, 128)).sum().backward()
    assert wide.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert wide(torch.randn(1, 128)).dtype == wide(torch.randn(LARGEST_BATCH + 1, 128)).dtype == torch.bfloat16
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        wide(torch.randn(1, 128).bfloat16())


def test_a_model_keeps_its_modules_and_gets_them_back() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    parts, weight = [*model], model[0].weight
    use_kernels(model)
    assert [*model] == parts and model[2].weight is weight and isinstance(model[0], PlainLinear)
    use_pytorch(model)
    assert type(model[0]) is type(model[2]) is nn.Linear


def test_the_operator_passes_opcheck_and_refuses_what_does_not_fit() -> None:
    weight = torch.randn(8, 64)
    torch.library.opcheck(plain_linear, (torch.randn(2, 3, 64), weight, torch.randn(8)))
    for arguments in (
        (torch.randn(2, 63), weight, None),
        (torch.randn(2, 64).half(), weight, None),
        (torch.randn(2, 64), weight, torch.randn(7)),
    ):
        with pytest.raises(PermpruneError, match="do not fit a weight of shape"):
            plain_linear(*arguments)
