"""Products with packed weights against float64, for every kernel that runs on this processor."""

import ctypes
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.product import native
from permprune.kernels.product.int8 import dequantize, int8_linear
from permprune.kernels.product.layout import BLOCK, DTYPES, FLOATS, LARGEST_BATCH
from permprune.kernels.product.linear import (
    multiply_reference,
    packed_linear,
    packed_linear_backward,
    round_to_int8,
)
from permprune.kernels.product.packed import PackedWeight
from permprune.kernels.product.plain import plain_linear
from permprune.pattern import Pattern
from permprune.system.device import INT4, processor_has
from tests.kernels.product.test_packed import PATTERNS
from tests.kernels.product.weights import packed, sparse

KERNELS = library.names()
FP32_EPSILON = torch.finfo(torch.float32).eps
PRECISION = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of results of each type, beside the largest one; bf16 by bf16 also rounds inside."""


def call(weight: PackedWeight, x: Tensor, bias: Tensor | None = None, order: Tensor | None = None) -> Tensor:
    """The operator on a packed weight."""
    layout = weight.layout
    pattern, width = layout.pattern, layout.width
    result: Tensor = packed_linear(x, weight.blocks, bias, order, width, pattern.n, pattern.m, layout.dtype)
    return result


def describe(weight: PackedWeight, bias: Tensor | None = None, order: Tensor | None = None) -> native.Weights:
    return native.describe(weight.layout, weight.blocks, bias, order)


def unpack(weight: PackedWeight, first: int, last: int, dtype: torch.dtype, kernels: str | None = None) -> Tensor:
    output = torch.empty(last - first, weight.layout.width, dtype=dtype)
    native.unpack(describe(weight), first, output, kernels)
    return output


def exact(
    weight: PackedWeight,
    x: Tensor,
    bias: Tensor | None = None,
    order: Tensor | None = None,
    *,
    rounded: bool = True,
    dense: Tensor | None = None,
) -> Tensor:
    """The product in float64, of activations rounded to int8 where the kernels for few rows round them.

    `dense` is the weight that counts, if not the packed one.
    """
    channels = x.float() if order is None else x.float()[:, order]
    if rounded and not weight.layout.dtype.is_floating_point:
        channels = round_to_int8(channels)
    y = channels.double() @ (weight.unpack() if dense is None else dense).double().T
    return y if bias is None else y + bias.double()


def as_multiplied(weight: PackedWeight, x: Tensor, kernels: str) -> tuple[Tensor, Tensor]:
    """The activations and the weight that the kernel for many rows multiplies: beside integers, fp32 becomes bf16."""
    functions, index = library.require(kernels)
    layout, dense = weight.layout, weight.unpack()
    if layout.dtype.is_floating_point or x.dtype == torch.float16:
        return x, dense
    if kernels == "amx":
        return x.bfloat16().to(x.dtype), dense.bfloat16().float()
    pairs = functions.permprune_runs_pairs(index) and layout.positions
    return x.bfloat16().to(x.dtype) if pairs else x, dense


def assert_near(found: Tensor, expected: Tensor, magnitude: float = 0.0) -> None:
    """Equal within `PRECISION`, or within the rounding of one long fp32 sum of terms with this sum of magnitudes."""
    limit = max(PRECISION[found.dtype] * max(1.0, float(expected.abs().max())), FP32_EPSILON * magnitude)
    assert found.shape == expected.shape
    assert float((found.double() - expected).abs().max()) <= limit


def test_this_processor_has_kernels() -> None:
    assert KERNELS[-1] == "portable"


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("most_rows", "most_batch", "many"), [(21, 18, False), (140, 420, True)])
@given(
    data=st.data(),
    pattern=st.sampled_from(PATTERNS),
    groups=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES),
    activations=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    extras=st.booleans(),
)
def test_products_agree_with_float64(
    kernels: str,
    most_rows: int,
    most_batch: int,
    many: bool,
    data: st.DataObject,
    pattern: str,
    groups: int,
    dtype: torch.dtype,
    activations: torch.dtype,
    extras: bool,
) -> None:
    """Of few rows of activations and of many, which are rounded to bf16 at most for integer weights."""
    rows, batch = data.draw(st.integers(1, most_rows)), data.draw(st.integers(1, most_batch))
    width = groups * Pattern.parse(pattern).m
    weight = packed(rows, width, pattern, dtype)
    x = torch.randn(batch, width, generator=torch.Generator().manual_seed(batch)).to(activations)
    bias = torch.linspace(-1, 1, rows).to(activations) if extras else None
    order = torch.randperm(width, generator=torch.Generator().manual_seed(width)) if extras else None
    found = native.multiply(describe(weight, bias, order), x, kernels, many=many)
    dense = weight.unpack()
    if many:
        x, dense = as_multiplied(weight, x, kernels)
    channels = x if order is None else x[:, order]
    magnitude = float((channels.double().abs() @ weight.unpack().double().abs().T).max()) if many else 0.0
    assert_near(found, exact(weight, x, bias, order, rounded=not many, dense=dense), magnitude)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "3:4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_rows_of_many_tiles(kernels: str, pattern: str, dtype: torch.dtype) -> None:
    weight = packed(37, 1032, pattern, dtype)
    x = torch.randn(6, 1032)
    assert_near(native.multiply(describe(weight), x, kernels), exact(weight, x))
    x = x.bfloat16()
    assert_near(native.multiply(describe(weight), x, kernels), exact(weight, x))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("rows", [1, 1001, 1100])
@pytest.mark.parametrize("batch", [800, 1601])
def test_bf16_in_another_order_and_padded_in_parts(kernels: str, rows: int, batch: int) -> None:
    """Such activations are copied some rows at a time, and sums are kept of some rows of the weight at a time."""
    weight, order = packed(rows, 132, dtype=torch.bfloat16), torch.randperm(132)
    x, bias = torch.randn(batch, 132).bfloat16(), torch.randn(rows)
    found = native.multiply(describe(weight, bias, order), x, kernels, many=True)
    assert_near(found, exact(weight, x, bias, order))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("batch", "threads"), [*((batch, 1) for batch in (1, 3, 14, 16, 65, 200, 800)), (800, 3)])
def test_no_more_than_the_least_memory_that_is_accepted_is_written(
    kernels: str, batch: int, threads: int, dtype: torch.dtype
) -> None:
    weight, x = packed(40, 132, dtype=dtype), torch.randn(batch, 132).to(dtype)
    weights, output, memory = describe(weight), torch.empty(batch, 40), native.aligned(1 << 21).fill_(7)
    functions, index = library.require(kernels)
    given = ctypes.byref(weights), x.data_ptr(), native.NUMBERS[x.dtype], batch, output.data_ptr(), memory.data_ptr()
    sizes = range(0, len(memory), 4 * weights.count * BLOCK)
    least = next(size for size in sizes if functions.permprune_multiply_many(*given, size, index, threads) == 0)
    assert 0 < least < len(memory) and bool((memory[least:] == 7).all())


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3, 13, 200, 800])
def test_the_same_bits_on_any_number_of_threads(
    kernels: str, dtype: torch.dtype, activations: torch.dtype, batch: int
) -> None:
    before = torch.get_num_threads()
    weight = packed(1001, 512, dtype=dtype)
    x = torch.randn(batch, 512).to(activations)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(native.multiply(describe(weight), x, kernels, many=batch > LARGEST_BATCH))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    if batch <= LARGEST_BATCH:
        assert_near(found[0], exact(weight, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "6:8"])
@pytest.mark.parametrize("batch", [1, native.MASKS_FROM, LARGEST_BATCH, LARGEST_BATCH + 1, native.MASKS_TO])
def test_the_operator_below_and_above_the_largest_batch(
    dtype: torch.dtype, activations: torch.dtype, pattern: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 300
    monkeypatch.setattr("permprune.kernels.product.linear.UNPACKED_BYTES", 128 * 320 * 4)
    weight = packed(rows, 320, pattern, dtype)
    x = torch.randn(batch, 320).to(activations)
    bias, order = torch.randn(rows), torch.randperm(320)
    described = describe(weight, bias, order)
    found, many = call(weight, x, bias, order), native.is_many(described, x)
    rounded, dense = native.is_few(described, x) and not many, weight.unpack()
    if many:
        x, dense = as_multiplied(weight, x, library.best().name)
    assert_near(found, exact(weight, x, bias, order, rounded=rounded, dense=dense))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, LARGEST_BATCH + 1])
def test_pytorch_gives_the_same_where_there_are_no_kernels(
    dtype: torch.dtype, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = packed(24, 320, dtype=dtype)
    x, bias, order = torch.randn(batch, 320), torch.randn(24), torch.randperm(320)
    monkeypatch.setattr(library, "available", lambda: False)
    found = call(weight, x, bias, order)
    assert_near(found, exact(weight, x, bias, order, rounded=batch <= LARGEST_BATCH))
    assert torch.equal(found, multiply_reference(weight, x, bias, order))


@pytest.mark.parametrize("shape", [(320,), (0, 320), (2, 3, 320), (2, 0, 320)])
def test_activations_of_any_dimensions(shape: tuple[int, ...]) -> None:
    weight = packed(24, 320)
    x = torch.randn(shape)
    found = call(weight, x)
    assert found.shape == (*shape[:-1], 24)
    if found.numel():
        assert_near(found.view(-1, 24), exact(weight, x.view(-1, 320)))


def test_activations_that_are_not_contiguous() -> None:
    weight = packed(24, 320)
    x = torch.randn(320, 6).T
    assert_near(call(weight, x), exact(weight, x))
    assert_near(call(weight, x[::2]), exact(weight, x[::2]))


def test_a_row_of_one_group() -> None:
    weight = packed(1, 7, "2:7")
    x = torch.randn(1, 7)
    assert_near(call(weight, x), exact(weight, x))


def not_finite(batch: int, width: int, dtype: torch.dtype) -> Tensor:
    """Activations of which three of every five rows have NaN or infinity; the others are finite."""
    x = torch.randn(batch, width, generator=torch.Generator().manual_seed(batch)).to(dtype)
    for row in range(batch):
        for channel, value in ((), ((3, torch.nan),), ((6, torch.inf),), ((1, -torch.inf), (7, torch.inf)), ())[
            row % 5
        ]:
            x[row, (channel + 11 * row) % width] = value
    return x


def assert_as_dense(found: Tensor, x: Tensor, dense: Tensor) -> None:
    """Rows that are not finite are those of the dense product, the others are finite."""
    expected, bad = x.double() @ dense.double().T, ~x.isfinite().all(1)
    assert bad.sum() >= len(x) // 2
    torch.testing.assert_close(found[bad].double(), expected[bad], rtol=0, atol=0, equal_nan=True)
    assert found[~bad].isfinite().all()


@pytest.mark.parametrize("has_instructions", [False, True])
def test_fp16_is_dense_where_it_has_instructions(has_instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = library.best()
    name = "avx512" if kernels.name == "amx" else kernels.name
    monkeypatch.setattr(library, "best", lambda: library.Traits(name, pairs=kernels.pairs))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_fp16": has_instructions}, raising=False)
    processor_has.cache_clear()
    weights, x = describe(packed(8, 64, dtype=torch.float16)), torch.ones(LARGEST_BATCH + 1, 64)
    leaves_out = library.best().name in native.MANY
    assert native.is_many(weights, x.half()) == (leaves_out and not has_instructions)
    assert native.is_many(weights, x) == leaves_out
    processor_has.cache_clear()


@pytest.mark.parametrize("matrix_units", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_bf16_is_dense_where_no_kernel_uses_the_instructions_for_it(
    pairs: bool, matrix_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": matrix_units}, raising=False)
    monkeypatch.setattr(library, "best", lambda: library.Traits("avx512", pairs=pairs))
    processor_has.cache_clear()
    x = torch.ones(native.MASKS_TO, 64).bfloat16()

    def is_many(pattern: str, dtype: torch.dtype, batch: int = LARGEST_BATCH + 1) -> bool:
        return native.is_many(describe(packed(8, 64, pattern, dtype)), x[:batch])

    assert is_many("2:4", torch.bfloat16) == (not (pairs and matrix_units))
    assert is_many("2:4", torch.bfloat16, 16) == (pairs and not matrix_units)
    for dtype in (torch.bfloat16, torch.int8):
        described = describe(packed(8, 64, "4:8", dtype))
        assert native.is_few(described, x[:32]) == native.is_few(described, x[:64]) == (not pairs)
        assert is_many("1:4", dtype, 96) == (not (pairs and matrix_units))
        assert is_many("4:8", dtype) == (not pairs or (dtype == torch.int8 and not matrix_units))
        assert is_many("4:8", dtype, 96) == (not pairs)
        assert is_many("6:8", dtype) is False
    assert is_many("2:4", torch.int8) == (not (pairs and matrix_units))
    processor_has.cache_clear()


def test_matrix_units_multiply_all_that_bf16_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "best", lambda: library.Traits("amx", pairs=True))
    for pattern in PATTERNS:
        width = 8 * Pattern.parse(pattern).m
        bf16, fp32 = torch.ones(native.TILES_FROM, width).bfloat16(), torch.ones(native.PAIRS_FROM + 1, width)
        for dtype in (torch.bfloat16, torch.int8, INT4):
            weights = describe(packed(8, width, pattern, dtype))
            assert native.is_many(weights, bf16) and not native.is_many(weights, bf16[1:])
        assert native.is_many(weights, fp32) and not native.is_many(weights, fp32[1:])
        split = torch.ones(native.SPLIT_FROM, width)
        for dtype, activations in product((torch.float32, torch.float16), FLOATS):
            weights, x = describe(packed(8, width, pattern, dtype)), split.to(activations)
            assert native.is_many(weights, x) and not native.is_many(weights, x[1:]) and native.is_few(weights, x[1:])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_of_any_size_are_multiplied_as_fp32(kernels: str, pattern: str, dtype: torch.dtype) -> None:
    """One activation a row, up to the largest: kernels that split numbers into parts of bf16 lose no bits."""
    weight = packed(40, 64, pattern, dtype)
    sizes = torch.linspace(-80, 126, 64).exp2() * torch.linspace(1, 1.999, 64)
    x = torch.diag(torch.cat([sizes[:-2], torch.tensor([torch.finfo().max, -torch.finfo().max])]))
    found = native.multiply(describe(weight), x, kernels, many=True)
    expected = (x.double() @ weight.unpack().double().T).float()
    torch.testing.assert_close(found, expected, rtol=3 * FP32_EPSILON, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("many", [False, True])
def test_activations_that_are_not_finite_give_what_the_dense_product_gives(
    kernel: str, dtype: torch.dtype, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "is_many", lambda weights, x: many)
    for pattern, activations in product(PATTERNS, FLOATS):
        if activations == torch.bfloat16 and not many and processor_has("amx_bf16"):
            continue  # PyTorch's own product with matrix units gives NaN in place of some infinities
        width = 22 * Pattern.parse(pattern).m
        weight, order, bias = packed(41, width, pattern, dtype), torch.randperm(width), torch.linspace(-1, 1, 41)
        for batch in (4, 13, LARGEST_BATCH + 5):
            x = not_finite(batch, width, activations)
            found = call(weight, x, bias, order)
            assert_as_dense(found, x[:, order], weight.unpack())
        assert found.isinf().any() and found.isnan().any()


def test_activations_that_are_not_finite_in_an_int8_table(kernel: str) -> None:
    values, scale = torch.randint(-2, 3, (41, 128), dtype=torch.int8), torch.full((41, 2), 0.03)
    for batch in (4, 13, LARGEST_BATCH + 5):
        x = not_finite(batch, 128, torch.float32)
        assert_as_dense(int8_linear(x, values, scale, None), x, dequantize(values, scale))
        assert_as_dense(plain_linear(x, values.float(), None), x, values.float())


@pytest.mark.parametrize("kernels", KERNELS)
def test_codes_that_lie_read_nothing_outside(kernels: str) -> None:
    for dtype in DTYPES:
        weight = packed(5, 192, dtype=dtype)
        weight.blocks.unflatten(1, (weight.layout.count, -1))[..., :8] = 255
        for batch in (1, 3, 13):
            for many in (False, True):
                native.multiply(describe(weight), torch.randn(batch, 192), kernels, many=many)
                native.multiply(describe(weight), torch.randn(batch, 192).bfloat16(), kernels, many=many)
        unpack(weight, 0, 5, torch.float32, kernels)


@pytest.mark.parametrize("batch", [1, LARGEST_BATCH + 1])
def test_orders_that_lie_are_refused(batch: int) -> None:
    weight = packed(5, 192)
    for bad in (192, -1):
        order = torch.arange(192)
        order[7] = bad
        with pytest.raises(PermpruneError, match="outside 0 to 191"):
            call(weight, torch.randn(batch, 192), order=order)


def test_input_that_does_not_fit_is_refused() -> None:
    weight = packed(5, 192)
    with pytest.raises(PermpruneError, match="do not fit a packed weight of 192 channels"):
        call(weight, torch.randn(1, 188))
    with pytest.raises(PermpruneError, match="float64"):
        call(weight, torch.randn(1, 192).double())
    with pytest.raises(PermpruneError, match="bias of shape"):
        call(weight, torch.randn(1, 192), bias=torch.zeros(4))
    with pytest.raises(PermpruneError, match="order of shape"):
        call(weight, torch.randn(1, 192), order=torch.arange(192, dtype=torch.int32))
    with pytest.raises(PermpruneError, match="activations are on meta and packed weights on cpu: move"):
        call(weight, torch.empty(1, 192, device="meta"))
    with pytest.raises(PermpruneError, match="has to be contiguous"):
        wide = PackedWeight(weight.layout, weight.blocks.T.contiguous().T)
        call(wide, torch.randn(1, 192))
    with pytest.raises(PermpruneError, match="activations have to be contiguous"):
        native.multiply(describe(weight), torch.randn(192, 2).T)
    for first, output in ((1, torch.empty(5, 192)), (0, torch.empty(5, 191)), (0, torch.empty(5, 192).double())):
        with pytest.raises(PermpruneError, match="cannot be unpacked"):
            native.unpack(describe(weight), first, output)
    with pytest.raises(PermpruneError, match="which do not run here: choose"):
        native.multiply(describe(weight), torch.randn(1, 192), "vax")


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_unpacking_agrees(kernels: str, dtype: torch.dtype) -> None:
    for pattern in PATTERNS:
        weight = packed(6, 50 * Pattern.parse(pattern).m, pattern, dtype)
        for to in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(unpack(weight, 1, 5, to, kernels), weight.unpack(to)[1:5])
            assert torch.equal(unpack(weight, 0, 6, to, kernels), weight.unpack(to))


@pytest.mark.parametrize("kernels", KERNELS)
def test_native_unpacking_of_int8_tables_agrees(kernels: str) -> None:
    values, scale = torch.randint(-127, 128, (7, 192), dtype=torch.int8), torch.rand(7, 3)
    weights = native.describe_plain(values, scale)
    for to in (torch.float32, torch.bfloat16, torch.float16):
        found = torch.empty(4, 192, dtype=to)
        native.unpack(weights, 2, found, kernels)
        assert torch.equal(found, dequantize(values, scale)[2:6].to(to))


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("batch", [0, 1, 40, LARGEST_BATCH, 2 * LARGEST_BATCH + 1])
def test_products_with_int8_tables_agree(x_dtype: torch.dtype, batch: int, kernel: str) -> None:
    values, scale = torch.randint(-127, 128, (70, 128), dtype=torch.int8), torch.rand(70, 2) / 100
    x, bias = torch.randn(batch, 128).to(x_dtype), torch.randn(70)
    found = int8_linear(x, values, scale, bias)
    assert found.dtype == x_dtype and found.shape == (batch, 70)
    expected = x.double() @ dequantize(values, scale).double().T + bias
    assert (found - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("number", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits_goes_in_and_out(number: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(number)
    finite = every[torch.isfinite(every)].view(1, -1)
    padded = torch.stack([finite, torch.zeros_like(finite)], -1).flatten(1)
    weight = PackedWeight.pack(padded, Pattern(1, 2))
    found = unpack(weight, 0, 1, torch.float32)[:, ::2]
    assert torch.equal(found, finite.float())
    wide = torch.randn(1, finite.shape[1], generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -12, 6, finite.shape[1]
    )
    weight = PackedWeight.pack(torch.stack([wide, torch.zeros_like(wide)], -1).flatten(1), Pattern(1, 2))
    assert torch.equal(unpack(weight, 0, 1, number)[:, ::2], wide.to(number))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_the_operators_pass_opcheck(dtype: torch.dtype) -> None:
    weight = packed(8, 64, dtype=dtype)
    order = torch.randperm(64)
    for x in (torch.randn(2, 64, requires_grad=True), torch.randn(2, 3, 64).bfloat16(), torch.randn(0, 64)):
        bias = torch.zeros(8, requires_grad=x.requires_grad)
        torch.library.opcheck(packed_linear, (x, weight.blocks, bias, order, 64, 2, 4, dtype))
        gradient = torch.randn(*x.shape[:-1], 8, dtype=x.dtype)
        torch.library.opcheck(packed_linear_backward, (gradient, weight.blocks, order, 64, 2, 4, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_dense_product(
    kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("permprune.kernels.product.linear.UNPACKED_BYTES", 2000)  # several tiles
    for pattern, activations in product(PATTERNS, FLOATS):
        width = 22 * Pattern.parse(pattern).m
        weight, order = packed(21, width, pattern, dtype), torch.randperm(width)
        for shape in ((width,), (3, width), (2, LARGEST_BATCH, width), (0, width)):
            x, bias = torch.randn(shape).to(activations).requires_grad_(), torch.randn(21, requires_grad=True)
            exact_x, exact_bias = (tensor.detach().double().requires_grad_() for tensor in (x, bias))
            gradient = torch.randn(*shape[:-1], 21).to(activations)
            call(weight, x, bias, order).backward(gradient)
            dense = exact_x[..., order] @ weight.unpack().double().T + exact_bias
            dense.backward(gradient.double())
            assert x.grad is not None and exact_x.grad is not None and bias.grad is not None
            torch.testing.assert_close(bias.grad.double(), exact_bias.grad, rtol=1e-5, atol=1e-4)
            if x.numel():
                assert_near(x.grad, exact_x.grad)


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64), (2, LARGEST_BATCH, 64)])
def test_results_with_gradients_are_changed_in_place(kernel: str, shape: tuple[int, ...]) -> None:
    weight = packed(8, 64, dtype=torch.int8)
    values, scale = torch.ones(8, 64, dtype=torch.int8), torch.ones(8, 1)
    operators: list[Callable[[Tensor], Tensor]] = [
        lambda x: call(weight, x),
        lambda x: int8_linear(x, values, scale, None),
    ]
    for operator in operators:
        x, y = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 8, requires_grad=True)
        result = operator(x)
        result += y  # as a block of Falcon adds its attention to its feed-forward layers
        result.sum().backward()
        assert x.grad is not None and x.grad.any()
        assert y.grad is not None and torch.equal(y.grad, torch.ones_like(y))


def test_gradients_through_an_int8_table() -> None:
    values, scale = torch.randint(-127, 128, (9, 128), dtype=torch.int8), torch.rand(9, 2)
    x, bias = torch.randn(2, 3, 128, requires_grad=True), torch.randn(9, requires_grad=True)
    torch.library.opcheck(torch.ops.permprune.int8_linear, (x, values, scale, bias))
    gradient = torch.randn(2, 3, 9)
    int8_linear(x, values, scale, bias).backward(gradient)
    assert x.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad, gradient @ dequantize(values, scale))
    torch.testing.assert_close(bias.grad, gradient.sum((0, 1)))


@pytest.mark.slow
def test_the_operator_exports_and_compiles() -> None:
    weight = packed(8, 64)

    class Linear(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(weight, x).relu()

    x = torch.randn(3, 64)
    expected = call(weight, x).relu()
    exported = torch.export.export(Linear(), (x,))
    assert torch.equal(exported.module()(x), expected)
    compiled = torch.compile(Linear(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x[:2]), expected[:2])


def test_activations_of_zero_or_almost() -> None:
    weight = packed(8, 64, dtype=torch.int8)
    assert torch.equal(call(weight, torch.zeros(2, 64)), torch.zeros(2, 8))
    assert torch.isfinite(call(weight, torch.full((2, 64), 1e-42))).all()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
def test_products_with_plain_weights_agree(kernels: str, dtype: torch.dtype) -> None:
    weight = torch.randn(9, 128)
    scale = torch.full((9, 2), 0.03) if dtype == torch.int8 else None
    values = (weight / 0.03).clamp(-127, 127).round().to(dtype) if dtype == torch.int8 else weight.to(dtype)
    weights = native.describe_plain(values, scale)
    for x in (torch.randn(5, 128), torch.randn(1, 128).bfloat16()):
        channels, stored = x.double(), values.double()
        if dtype == torch.int8:
            channels, stored = round_to_int8(x.float()).double(), stored * 0.03
        assert_near(native.multiply(weights, x, kernels), channels @ stored.T)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "blocks", "batch"), [(1, 1, 1), (33, 9, 40), (70, 2, 700), (100, 25, 65)])
def test_matrix_units_multiply_many_rows_of_int8_tables(
    kernels: str, activations: torch.dtype, rows: int, blocks: int, batch: int
) -> None:
    """Other kernels for many rows leave out what is pruned, and refuse them."""
    width = 64 * blocks
    values, scale = torch.randint(-127, 128, (rows, width), dtype=torch.int8), torch.rand(rows, blocks) / 100
    x, bias = torch.randn(batch, width).to(activations), torch.randn(rows)
    weights = native.describe_plain(values, scale, bias)
    if kernels != "amx":
        with pytest.raises(PermpruneError, match=f"a product of {batch} rows"):
            native.multiply(weights, x, kernels, many=True)
        return
    dense, rounded = dequantize(values, scale).bfloat16().double(), x.bfloat16().double()
    magnitude = float((rounded.abs() @ dense.abs().T).max())
    assert_near(native.multiply(weights, x, kernels, many=True), rounded @ dense.T + bias, magnitude)


def test_the_weights_of_the_tests_hold_their_pattern() -> None:
    for pattern in map(Pattern.parse, PATTERNS):
        assert pattern.holds(sparse(3, 4 * pattern.m, pattern))
