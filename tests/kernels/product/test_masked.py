"""Products with masked weights, for every kernel that runs on this processor, beside float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.product import masked
from permprune.kernels.product.masked import LEAST_ROWS, MaskedWeight, PackedWeights
from permprune.kernels.search.masks import pack_mask
from permprune.pattern import Pattern
from permprune.system.device import processor_has


@pytest.mark.usefixtures("kernel")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    rows=st.integers(1, 150),
    width=st.integers(1, 200),
    batch=st.sampled_from([1, LEAST_ROWS - 1, LEAST_ROWS, 2 * LEAST_ROWS + 77]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    biased=st.booleans(),
    apart=st.booleans(),
)
def test_a_linear_layer_multiplies_what_the_mask_keeps(
    rows: int, width: int, batch: int, share: float, biased: bool, apart: bool
) -> None:
    weight = torch.randn(rows, width + 3)[:, 1 : width + 1] if apart else torch.randn(rows, width)
    mask = torch.rand(rows, width) < share
    bias = torch.randn(rows) if biased else None
    x = torch.randn(3, batch, width)[1:2] if apart else torch.randn(1, batch, width)
    with torch.inference_mode():
        found = F.linear(x, MaskedWeight.of(weight, pack_mask(mask)), bias)
    expected = F.linear(x.double(), (weight * mask).double(), None if bias is None else bias.double())
    assert found.shape == expected.shape
    assert torch.allclose(found.double(), expected, atol=2e-5, rtol=1e-5)


def test_what_is_not_finite_counts_as_in_the_dense_product() -> None:
    weight, mask = torch.randn(40, 70), torch.rand(40, 70) < 0.5
    x = torch.randn(LEAST_ROWS, 70)
    x[3, 5], x[7, 69], x[8, 0] = torch.nan, torch.inf, -torch.inf
    found = F.linear(x, MaskedWeight.of(weight, pack_mask(mask)))
    torch.testing.assert_close(found, F.linear(x, weight * mask), equal_nan=True, atol=2e-5, rtol=1e-5)


def test_other_functions_are_given_the_zeros() -> None:
    weight, mask = torch.randn(5, 9), torch.rand(5, 9) < 0.5
    masked = MaskedWeight.of(weight, pack_mask(mask))
    assert torch.equal(masked * 2, weight * mask * 2)
    assert torch.equal(torch.mm(torch.ones(2, 5), masked), torch.ones(2, 5) @ (weight * mask))
    assert torch.equal(F.linear(torch.ones(1, 9), weight=masked), F.linear(torch.ones(1, 9), weight * mask))


def test_products_do_not_depend_on_the_threads() -> None:
    weight, mask, x = torch.randn(700, 600), torch.rand(700, 600) < 0.5, torch.randn(LEAST_ROWS, 600)
    masked, threads = MaskedWeight.of(weight, pack_mask(mask)), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(F.linear(x, masked))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 150),
    groups=st.integers(1, 60),
    batch=st.sampled_from([1, LEAST_ROWS, 2 * LEAST_ROWS + 77]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    biased=st.booleans(),
)
def test_products_in_bf16_follow_the_order_of_the_columns(
    rows: int, groups: int, batch: int, dtype: torch.dtype, biased: bool
) -> None:
    columns, mask = torch.randperm(4 * groups), torch.empty(rows, 4 * groups, dtype=torch.bool)
    mask[:, columns] = Pattern(2, 4).mask(torch.rand(rows, 4 * groups))
    weight, x = torch.randn(rows, 4 * groups).to(dtype), torch.randn(batch, 4 * groups)
    bias = torch.randn(rows) if biased else None
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = F.linear(x, MaskedWeight.of(weight, pack_mask(mask), columns), bias)
        expected = F.linear(x, weight * mask, bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.01 * float(expected.abs().max()), rtol=0.02)


@pytest.mark.skipif(not (library.available() and library.best().pairs), reason="needs instructions for pairs of bf16")
def test_a_mask_that_does_not_follow_the_columns_is_refused() -> None:
    mask, columns = Pattern(2, 4).mask(torch.rand(8, 16)), torch.tensor([0, 4, 8, 12, *set(range(16)) - {0, 4, 8, 12}])
    mask[:, :4] = torch.tensor([True, True, False, False])
    mask[:, 4] = mask[:, 8] = mask[:, 12] = True
    with torch.inference_mode(), pytest.raises(PermpruneError, match="pattern"):
        F.linear(torch.ones(LEAST_ROWS, 16), MaskedWeight.of(torch.randn(8, 16), pack_mask(mask), columns))


def test_only_what_pays_fits() -> None:
    weight, fp32 = torch.randn(8, 16), torch.float32
    if library.available():
        assert MaskedWeight.fits(weight, Pattern(2, 4), fp32)
        pairs = library.best().pairs and not processor_has("amx_bf16")
        assert MaskedWeight.fits(weight.bfloat16(), Pattern(2, 4), torch.bfloat16) == pairs
    assert not MaskedWeight.fits(weight, Pattern(3, 4), fp32)
    assert not MaskedWeight.fits(weight, Pattern(4, 8), torch.bfloat16)
    assert not MaskedWeight.fits(weight.bfloat16(), Pattern(2, 4), fp32)
    assert not MaskedWeight.fits(weight.T, Pattern(2, 4), fp32)


@pytest.mark.skipif(not library.available(), reason="needs the kernels")
def test_kept_weights_are_packed_once_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    bits, x = pack_mask(Pattern(2, 4).mask(torch.rand(64, 64))), torch.randn(LEAST_ROWS, 64)
    weights = {"kept": torch.randn(64, 64), "beyond the room": torch.randn(64, 64)}
    monkeypatch.setattr(masked, "ROOM", MaskedWeight.of(weights["kept"], bits).packed_bytes)
    packed = PackedWeights()

    def product(name: str) -> torch.Tensor:
        weight = MaskedWeight.of(weights[name], bits)
        packed.lend(name, weight)
        return F.linear(x, weight)

    before = {name: product(name) for name in weights}
    for weight in weights.values():
        weight.mul_(2)
    assert torch.equal(product("kept"), before["kept"])
    assert torch.equal(product("beyond the room"), 2 * before["beyond the room"])


def test_a_mask_of_another_shape_is_refused() -> None:
    weight, mask = torch.randn(8, 16), torch.ones(8, 8, dtype=torch.bool)
    with pytest.raises(PermpruneError, match="mask"):
        F.linear(torch.ones(LEAST_ROWS, 16), MaskedWeight.of(weight, pack_mask(mask)))
