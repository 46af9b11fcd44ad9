"""Attention of many queries on matrix units, beside PyTorch's in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.attention.native import attend_many

on_matrix_units = pytest.mark.skipif("amx" not in library.names(), reason="the processor has no matrix units")

LEAST = 2**-8
"""Half of the last bit of numbers around one."""


def states(*shape: int, seed: int = 0, apart: bool = False) -> Tensor:
    """Random numbers (batch, heads, tokens, width); `apart`, as the views that models make of (batch, tokens, ...)."""
    batch, heads, tokens, width = shape
    drawn = torch.randn(batch, tokens, heads, width + 3 * apart, generator=torch.Generator().manual_seed(seed))
    return drawn.bfloat16()[..., :width].transpose(1, 2)


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    given = query.double(), key.double(), value.double(), mask
    return F.scaled_dot_product_attention(*given, enable_gqa=True).transpose(1, 2)


@on_matrix_units
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    width=st.sampled_from([1, 16, 24, 40, 64, 80, 128, 256]),
    count=st.integers(1, 100),
    length=st.integers(1, 200),
    read=st.sampled_from(["all", "causal", "shared mask", "a mask for each head"]),
    apart=st.booleans(),
    threads=st.sampled_from([1, 3]),
)
def test_many_queries_get_what_float64_gives(
    batch: int, heads: int, group: int, width: int, count: int, length: int, read: str, apart: bool, threads: int
) -> None:
    query = states(batch, heads * group, count, width, apart=apart)
    key, value = (states(batch, heads, length, width, seed=seed, apart=apart) for seed in (1, 2))
    mask = None
    if "mask" in read:
        shape = (batch, 1, 1, length) if read == "shared mask" else (batch, heads * group, count, length)
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.6
        mask[..., -1] = True  # a query reads at least one token
    expected = exact(query, key, value, mask, read == "causal")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = attend_many(query, key, value, scaling=width**-0.5, mask=mask, causal=read == "causal")
    finally:
        torch.set_num_threads(before)
    assert found.dtype == torch.bfloat16 and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=2 * LEAST, atol=2 * LEAST)


@on_matrix_units
def test_queries_that_read_nothing_and_numbers_that_are_not_finite() -> None:
    query, key, value = states(1, 2, 40, 32), states(1, 1, 70, 32, seed=1), states(1, 1, 70, 32, seed=2)
    mask = torch.ones(40, 70, dtype=torch.bool)
    mask[3] = mask[:, 69] = False
    key[:, :, 69], value[:, :, 69] = torch.nan, 1e4  # of a token that no query reads
    found = attend_many(query, key, value, scaling=1.0, mask=mask)
    assert not found[:, 3].any() and found.isfinite().all()
    query[0, 0, 5] = torch.nan
    query[0, 1, 6] = 3e38  # a few scores become infinite
    wrong = attend_many(query, key, value, scaling=1.0, mask=mask)
    assert wrong[0, 5, 0].isnan().all() and wrong[0, 6, 1].isnan().any()
    wrong[0, 5, 0], wrong[0, 6, 1] = found[0, 5, 0], found[0, 6, 1]
    assert torch.equal(wrong, found)
    assert attend_many(query[:, :, :0], key, value, scaling=1.0).shape == (1, 0, 2, 32)
    assert not attend_many(query, key[:, :, :0], value[:, :, :0], scaling=1.0).any()


@pytest.mark.parametrize("case", ["width", "heads", "type", "lengths", "scaling", "wide", "mask"])
def test_what_does_not_match_is_refused(case: str) -> None:
    width = 264 if case == "wide" else 32
    query, key = states(1, 4, 5, width), states(1, 3 if case == "heads" else 2, 7, 16 if case == "width" else width)
    value = key[:, :, :6] if case == "lengths" else key
    mask = torch.ones(5, 7) if case == "mask" else None
    with pytest.raises(PermpruneError):
        attend_many(
            query.float() if case == "type" else query,
            key,
            value,
            scaling=-1.0 if case == "scaling" else 1.0,
            mask=mask,
        )


@pytest.mark.parametrize("kernel", [name for name in library.names() if name != "amx"], indirect=True)
def test_processors_without_matrix_units_are_told(kernel: str) -> None:
    query = states(1, 2, 4, 32)
    with pytest.raises(PermpruneError, match="do not run on this processor"):
        attend_many(query, query, query, scaling=1.0)
