"""The Triton kernels in Triton's interpreter, against PyTorch; on a GPU itself where there is one."""

import numpy as np
import pytest
import torch

from permprune.kernels.product import gpu
from permprune.kernels.product.int8 import dequantize, int8_linear
from permprune.kernels.product.layout import DTYPES
from permprune.kernels.product.linear import multiply_gpu, multiply_reference
from permprune.kernels.product.packed import PackedWeight
from permprune.pattern import Pattern
from tests.kernels.product.test_linear import assert_as_dense, not_finite

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(3, 5)]


def with_batches(*batches: int, each: int) -> list[tuple[Pattern, torch.dtype, int]]:
    """Each pattern in each type, with `each` of the batches, so that every pattern, as every type, has every batch.

    Pattern and type decide how weights are decoded, and the batch which tiles they are multiplied with.
    """
    return [
        (pattern, dtype, batches[(row + column + 2 * turn) % len(batches)])
        for row, pattern in enumerate(PATTERNS)
        for column, dtype in enumerate(DTYPES)
        for turn in range(each)
    ]


def packed(pattern: Pattern, dtype: torch.dtype, rows: int, width: int) -> PackedWeight:
    weight = torch.randn(rows, width, device=DEVICE)
    return PackedWeight.pack(weight * pattern.mask(weight.abs()), pattern, dtype)


@pytest.mark.parametrize(("pattern", "dtype", "batch"), with_batches(1, 5, 16, 40, 70, each=2), ids=str)
def test_products_are_those_of_pytorch(pattern: Pattern, dtype: torch.dtype, batch: int) -> None:
    rows, width = 37, 30 * pattern.m
    weight = packed(pattern, dtype, rows, width)
    bias = torch.randn(rows, device=DEVICE)
    x = torch.randn(batch, width, device=DEVICE).to(dtype if dtype.is_floating_point else torch.float32)
    order = torch.randperm(width, device=DEVICE)
    found, expected = (multiply(weight, x, bias, order) for multiply in (multiply_gpu, multiply_reference))
    assert found.dtype == x.dtype
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=2e-3 * width**0.5)


@pytest.mark.parametrize(("pattern", "dtype", "batch"), with_batches(4, 40, 70, each=1), ids=str)
def test_activations_that_are_not_finite_give_what_the_dense_product_gives(
    pattern: Pattern, dtype: torch.dtype, batch: int
) -> None:
    weight = packed(pattern, dtype, 41, 30 * pattern.m)
    x = not_finite(batch, 30 * pattern.m, dtype if dtype.is_floating_point else torch.float32).to(DEVICE)
    with np.errstate(invalid="ignore"):  # the interpreter multiplies with numpy
        found = multiply_gpu(weight, x, None, None)
    assert_as_dense(found, x, weight.unpack())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacked_weights_are_those_of_pytorch(pattern: Pattern, dtype: torch.dtype) -> None:
    weight = packed(pattern, dtype, 35, 20 * pattern.m)
    target = dtype if dtype.is_floating_point else torch.float32
    found = gpu.unpack(gpu.of_packed(weight), target)
    assert torch.equal(found, weight.unpack(target))


@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=str)
def test_codes_that_lie_read_nothing_outside(pattern: Pattern) -> None:
    weight = packed(pattern, torch.float32, 4, 128)
    weight.blocks.unflatten(1, (weight.layout.count, -1))[..., :8] = 255
    found = gpu.multiply(torch.ones(1, 128, device=DEVICE), gpu.of_packed(weight), None)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_with_int8_tables_are_those_of_pytorch(batch: int, dtype: torch.dtype) -> None:
    values = torch.randint(-127, 128, (37, 192), dtype=torch.int8, device=DEVICE)
    scale, bias = torch.rand(37, 3, device=DEVICE), torch.randn(37, device=DEVICE)
    x = torch.randn(batch, 192, device=DEVICE).to(dtype)
    expected = x.double() @ dequantize(values, scale).double().T + bias
    table = gpu.of_table(values, scale)
    found = gpu.multiply(x, table, bias)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 if dtype == torch.float32 else 0.5)
    for target in (torch.float32, torch.float16):
        assert torch.equal(gpu.unpack(table, target), dequantize(values, scale).to(target))


@pytest.mark.parametrize("batch", [1, 40, 70])
def test_the_operator_of_int8_tables(batch: int) -> None:
    values = torch.randint(-127, 128, (37, 192), dtype=torch.int8, device=DEVICE)
    scale, bias = torch.rand(37, 3, device=DEVICE), torch.randn(37, device=DEVICE)
    x = torch.randn(batch, 192, device=DEVICE)
    expected = x.double() @ dequantize(values, scale).double().T + bias
    assert (int8_linear(x, values, scale, bias) - expected).norm() <= 0.02 * expected.norm()
