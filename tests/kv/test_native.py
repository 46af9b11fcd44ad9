"""The native kernels of the pruned cache, against PyTorch, for every kernel that runs here."""

import ctypes
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.attention.native import Side, attend
from permprune.kernels.attention.states import SCALED, PackedStates
from permprune.kv.attention import attention
from permprune.kv.config import KVConfig, pattern_of
from permprune.kv.layer import PackedCacheLayer
from permprune.kv.packing import Channels, StatesLayout, decode, encode

from .reference import random_channels

Select = Callable[[str], None]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
PATTERNS = ["2:4", "1:4", "3:4", "1:2", "4:8", "dense"]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture
def select(monkeypatch: pytest.MonkeyPatch) -> Iterator[Select]:
    """A function that selects kernels, or "torch"."""

    def choose(name: str) -> None:
        library.chosen.cache_clear()
        monkeypatch.setenv(library.FORCED, name)

    yield choose
    library.chosen.cache_clear()


def packed(
    text: str, dtype: torch.dtype, width: int, recovery: bool = True
) -> tuple[dict[str, Tensor], Channels, StatesLayout]:
    channels = random_channels(2, width)
    layout = StatesLayout(pattern_of(text, width), dtype, recovery)
    return encode(torch.randn(2, 2, 37, width), channels, layout), channels, layout


@pytest.mark.parametrize("kernel", library.names())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", [*PATTERNS, "auto", "5:8"])
@pytest.mark.parametrize("width", [64, 72, 128])
def test_states_are_unpacked_as_by_pytorch(
    select: Select, kernel: str, dtype: torch.dtype, text: str, width: int
) -> None:
    select(kernel)
    for recovery, wanted in ((True, torch.float32), (False, torch.float32), (True, torch.bfloat16)):
        parts, channels, layout = packed(text, dtype, width, recovery)
        states = PackedStates(parts, channels.level, layout.pattern, layout.dtype)
        some = {name: part[:, :, 3:] for name, part in parts.items()}
        found, expected = states.unpack(3, 34, wanted), decode(some, channels, layout, wanted)
        if dtype in SCALED:  # the scale is multiplied last
            torch.testing.assert_close(found, expected, rtol=1e-6 if wanted == torch.float32 else 1e-2, atol=0)
        else:
            assert torch.equal(found, expected)


def guarded(tensor: Tensor) -> Tensor:
    """A copy that ends where memory ends: reading beyond it is a fault."""
    page = mmap.PAGESIZE
    pages = -(-tensor.nbytes // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * page
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) == 0
    copy = torch.frombuffer(
        memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages * page - tensor.nbytes
    ).view_as(tensor)
    return copy.copy_(tensor)


@pytest.mark.parametrize("kernel", library.names())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", [*PATTERNS, "auto", "5:8"])
def test_nothing_is_read_beyond_the_tensors(select: Select, kernel: str, dtype: torch.dtype, text: str) -> None:
    select(kernel)
    for width in (8, 40, 64, 72, 256):
        parts, channels, layout = packed(text, dtype, width)
        states = PackedStates(
            {name: guarded(part) for name, part in parts.items()}, channels.level, layout.pattern, dtype
        )
        states.unpack(30, 7, torch.float32)
        if dtype.is_floating_point:
            whole = guarded(torch.randn(2, 2, 5, width).to(dtype))
            side = Side(states, whole, channels.order)
            mask = guarded(torch.ones(2, 1, 1, 42, dtype=torch.bool))
            queries = guarded(torch.randn(2, 4, 1, width))
            attend(queries, side, side, packed=37, before=3, scaling=1.0, mask=mask)


def query(layer: PackedCacheLayer, states: list[Tensor], mask: Tensor | None, **options: Any) -> Tensor:
    module = nn.Identity()
    module.num_key_value_groups = states[0].shape[1] // states[1].shape[1]
    output: Tensor = attention(module, states[0], *layer.update(states[1], states[2]), mask, **options)[0]
    return output


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.tuples(*[st.sampled_from([*PATTERNS, "auto"])] * 2, st.sampled_from(["auto", "int8"])),
    st.sampled_from(list(CLOSE)),
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.sampled_from([1, 3, 17])),
    st.tuples(st.sampled_from([8, 64, 80]), st.sampled_from([16, 64, 128])),
    st.tuples(st.integers(1, 600), st.integers(1, 4), st.integers(0, 9)),
    st.tuples(st.sampled_from([None, 3.0]), st.booleans(), st.sampled_from(["none", "bool", "float"]), st.booleans()),
)
def test_attention_is_that_of_pytorch(
    select: Select,
    stored: tuple[str, str, str],
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    widths: tuple[int, int],
    counts: tuple[int, int, int],
    options: tuple[float | None, bool, str, bool],
) -> None:
    (batch, heads, group), (past, new, sinks) = shape, counts
    softcap, learned, masked, biased = options
    config = KVConfig(*stored[:2], dtype=stored[2], window=11, sinks=sinks)
    channels = random_channels(heads, widths[0]), random_channels(heads, widths[1])
    first, then = (
        [
            torch.randn(batch, many, tokens, width).to(dtype)
            for many, width in ((heads * group, widths[0]), (heads, widths[0]), (heads, widths[1]))
        ]
        for tokens in (past, new)
    )
    visible = torch.rand(batch, 1, new, past + new) < 0.7
    added = torch.zeros(batch, 1, new, past + new, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    mask = {"none": None, "bool": visible, "float": added}[masked]
    call = {
        "softcap": softcap,
        "s_aux": torch.randn(heads * group) if learned else None,
        "position_bias": torch.randn(1, heads * group, new, past + new) if biased else None,
    }
    found = {}
    for name in ("torch", *library.names()):
        select("torch")
        layer = PackedCacheLayer(config, *channels)
        query(layer, first, None)
        select(name)
        found[name] = query(layer, then, mask, **call)
    for name in library.names():
        torch.testing.assert_close(found[name], found["torch"], rtol=CLOSE[dtype], atol=CLOSE[dtype])


def filled(tokens: int, text: str = "2:4", width: int = 64) -> PackedCacheLayer:
    layer = PackedCacheLayer(
        KVConfig(text, text, dtype="auto", window=8), random_channels(2, width), random_channels(2, width)
    )
    layer.update(*torch.randn(2, 2, 2, tokens, width))
    return layer


def test_the_number_of_threads_changes_nothing() -> None:
    layer, states = filled(2100), [torch.randn(2, heads, 1, 64) for heads in (6, 2, 2)]
    view, _ = layer.update(*states[1:])
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(attention(nn.Identity(), states[0], view, view, None)[0])
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_query_that_reads_no_token_gets_zeros() -> None:
    states = [torch.randn(2, heads, 1, 64) for heads in (4, 2, 2)]
    mask = torch.zeros(2, 1, 1, 101, dtype=torch.bool)
    mask[1, ..., 50] = True
    found = query(filled(100), states, mask)
    assert not found[0].any() and found[1].any(-1).all()


def test_gradients_are_those_of_pytorch() -> None:
    states = [torch.randn(2, heads, 1, 64) for heads in (4, 2, 2)]
    states[0].requires_grad_()
    query(filled(100), states, None).sum().backward()
    assert states[0].grad is not None and states[0].grad.any()


def test_damaged_codes_and_orders_are_refused() -> None:
    states = [torch.randn(2, heads, 1, 64) for heads in (4, 2, 2)]
    layer = filled(100, "4:8")
    assert layer.packed is not None
    layer.packed[1].parts["code"][1, 0, 5, 2] ^= 4
    with pytest.raises(PermpruneError, match="a code does not keep its pattern"):
        query(layer, states, None)
    with pytest.raises(PermpruneError, match="a code does not keep its pattern"):
        layer.packed[1].read(0, 8, torch.float32)
    layer = filled(100)
    assert layer.packed is not None
    view, _ = layer.update(*states[1:])
    layer.packed[0].channels.order[1, 3] = 64
    with pytest.raises(PermpruneError, match="an order names channels that do not exist"):
        attention(nn.Identity(), states[0], view, view, None)


def test_parts_that_do_not_match_are_refused() -> None:
    parts, channels, layout = packed("2:4", torch.int8, 64)
    for changed in (
        {**parts, "code": parts["code"][..., :5]},
        {**parts, "scale": parts["scale"].float()},
        {**parts, "values": parts["values"].transpose(1, 2)},
        {name: part for name, part in parts.items() if name != "amplitude"},
    ):
        with pytest.raises(PermpruneError, match="parts that do not match"):
            PackedStates(changed, channels.level, layout.pattern, layout.dtype)
    states = PackedStates(parts, channels.level, layout.pattern, layout.dtype)
    with pytest.raises(PermpruneError, match="38 of 37 packed tokens from 0 on cannot be unpacked"):
        states.unpack(0, 38, torch.float32)
