"""The layer of a pruned cache, compared with one that keeps everything whole."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.kv.attention import attention
from permprune.kv.coding import code, decode
from permprune.kv.config import KVConfig
from permprune.kv.layer import PackedCacheLayer
from permprune.kv.packing import Channels

from .reference import PLAIN, ReferenceLayer, coded_channels, random_channels

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PADDING = torch.tensor([8, 0, 24])  # whole steps of packing


CODED = KVConfig("4bit", "3bit", window=8, sinks=2)
"""Keys and values in few bits."""


def coded() -> tuple[Channels, Channels]:
    """Channels for `CODED` of two heads, with means of keys that move."""
    return coded_channels([4, 4], 8, moving=True), coded_channels([3, 3], 8)


def call(layer: PackedCacheLayer | ReferenceLayer, states: list[Tensor], mask: Tensor | None, **options: Any) -> Tensor:
    """The attention of new tokens, given their queries, keys and values."""
    query, keys, values = states
    module = nn.Identity()
    module.num_key_value_groups = query.shape[1] // keys.shape[1]
    output: Tensor = attention(module, query, *layer.update(keys, values), mask, **options)[0]
    return output


def random_states(batch: int, heads: int, group: int, tokens: int, widths: tuple[int, int]) -> list[Tensor]:
    shapes = [(heads * group, widths[0]), (heads, widths[0]), (heads, widths[1])]
    return [torch.randn(batch, count, tokens, width) for count, width in shapes]


def causal_mask(padding: Tensor, past: int, new: int) -> Tensor:
    """Bool (batch, 1, new, past + new), where each row begins with `padding[row]` tokens that none reads."""
    position = torch.arange(past + new)
    mask = position <= torch.arange(past, past + new)[:, None]
    return mask & (position >= padding[:, None, None, None])


configs = st.builds(
    KVConfig,
    st.sampled_from(["2:4", "1:4", "3:4", "1:2", "4:8", "5:8", "auto", "dense"]),
    st.sampled_from(["2:4", "1:4", "1:2", "auto", "dense"]),
    dtype=st.just("auto"),
    recovery=st.sampled_from(["zeros", "sign"]),
    window=st.integers(0, 20),
    sinks=st.integers(0, 5),
)


@settings(max_examples=40)
@given(
    configs,
    st.booleans(),
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)),
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.sampled_from([None, 5.0]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_queries_read_what_a_whole_cache_pruned_alike_gives(
    config: KVConfig,
    exact: bool,
    shape: tuple[int, int, int],
    calls: list[int],
    softcap: float | None,
    sinks: bool,
    padded: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    batch, heads, group = shape
    channels = random_channels(heads, 8), random_channels(heads, 16)
    layer, reference = PackedCacheLayer(config, *channels, exact), ReferenceLayer(config, channels, exact)
    padding = torch.randint(0, 60, (batch,)) if padded else torch.zeros(batch, dtype=torch.int64)
    past = 0
    for new in calls:
        states = random_states(batch, heads, group, new, (8, 16))
        options = {
            "softcap": softcap,
            "s_aux": torch.randn(heads * group) if sinks else None,
            "position_bias": torch.randn(1, heads * group, new, past + new),
        }
        mask = causal_mask(padding, past, new) if padded or past else None
        found, expected = (call(own, states, mask, **options) for own in (layer, reference))
        reading = torch.ones(batch, new, dtype=torch.bool) if mask is None else mask[:, 0].any(-1)  # not padding
        torch.testing.assert_close(found[reading], expected[reading], **CLOSE)
        past += new
    assert layer.get_seq_length() == past


def test_long_contexts_go_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, small in (("QUERIES", 7), ("SCORES", 64), ("STATES", 64), ("LEAST_BLOCK", 5)):
        monkeypatch.setattr(f"permprune.kv.attention.{name}", small)
    monkeypatch.setattr("permprune.kv.packing.BLOCK", 3)
    for exact in (False, True):
        config, channels = PLAIN.replace(window=5), (random_channels(2, 8), random_channels(2, 8))
        layer, reference = PackedCacheLayer(config, *channels, exact), ReferenceLayer(config, channels, exact)
        past = 0
        for new in (30, 1, 25):
            states = random_states(1, 2, 2, new, (8, 8))
            mask = causal_mask(torch.zeros(1), past, new)
            torch.testing.assert_close(call(layer, states, mask), call(reference, states, mask), **CLOSE)
            past += new


@settings(max_examples=20)
@given(configs, st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 2**32))
def test_an_exact_window_makes_the_calls_indifferent(config: KVConfig, calls: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    channels, total = (random_channels(2, 8), random_channels(2, 8)), sum(calls)
    states = random_states(1, 2, 1, total, (8, 8))
    whole = PackedCacheLayer(config, *channels, exact_window=True)
    expected = call(whole, states, None)
    layer = PackedCacheLayer(config, *channels, exact_window=True)
    past, found = 0, []
    for new in calls:
        part = [t[:, :, past : past + new] for t in states]
        found.append(call(layer, part, causal_mask(torch.zeros(1), past, new)))
        past += new
    torch.testing.assert_close(torch.cat(found, 1), expected, **CLOSE)


def filled(config: KVConfig, tokens: int, batch: int = 2) -> PackedCacheLayer:
    layer = PackedCacheLayer(config, random_channels(2, 16), random_channels(2, 16))
    call(layer, random_states(batch, 2, 1, tokens, (16, 16)), None)
    return layer


def read(layer: PackedCacheLayer) -> Tensor:
    """What a query reads, for fixed new states."""
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(1, 2, 1, 16, generator=generator).expand(len(layer.keys), -1, -1, -1) for _ in range(3)]
    return call(layer, states, None)


@pytest.mark.parametrize("removed", [1, 5, 30, 59, 60])
def test_a_crop_keeps_the_first_tokens_as_they_are(removed: int) -> None:
    config = PLAIN.replace(window=8, sinks=4)
    layer = filled(config, 60)
    before = [t.clone() for t in layer.tensors()]
    layer.crop(0)
    layer.crop(-removed)
    left = 60 - removed
    assert layer.get_seq_length() == left
    assert layer.packed is not None
    packed = layer.packed[0].length
    assert packed == min(max(0, left - 4), 48)
    assert torch.equal(layer.keys, before[0][:, :, : left - packed])
    for new in (1, 20):
        call(layer, random_states(2, 2, 1, new, (16, 16)), causal_mask(torch.zeros(2), layer.get_seq_length(), new))
    assert layer.get_seq_length() == left + 21
    with pytest.raises(ValueError, match="negative"):
        layer.crop(3)


def test_rows_of_the_batch_are_selected_and_repeated() -> None:
    config = PLAIN.replace(window=8)
    torch.manual_seed(1)
    expected = read(filled(config, 40))
    for change, rows in (
        (lambda layer: layer.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
    ):
        torch.manual_seed(1)
        layer = filled(config, 40)
        change(layer)
        torch.testing.assert_close(read(layer), expected[rows], **CLOSE)


def test_a_copy_reads_the_same_and_grows_alone() -> None:
    layer = filled(PLAIN.replace(window=8), 40)
    twin, changed = copy.deepcopy(layer), copy.deepcopy(layer)
    expected = read(layer)
    assert torch.equal(read(copy.deepcopy(twin)), expected)
    call(changed, random_states(2, 2, 1, 30, (16, 16)), causal_mask(torch.zeros(2), 40, 30))
    assert torch.equal(read(twin), expected)


def test_an_empty_layer_takes_every_change() -> None:
    layer = PackedCacheLayer(KVConfig())
    layer.reset()
    layer.crop(-3)
    layer.reorder_cache(torch.tensor([0]))
    assert layer.get_seq_length() == 0 and layer.dense_nbytes == 0 and not list(layer.tensors())


def test_memory_grows_in_steps_and_holds_no_token_twice() -> None:
    layer = filled(PLAIN.replace(window=16, sinks=4), 500, batch=1)
    addresses = set()
    for _ in range(128):
        call(layer, random_states(1, 2, 1, 1, (16, 16)), None)
        assert layer.packed is not None
        addresses.add(layer.packed[0].parts["values"].data_ptr())
    assert len(addresses) <= 3
    assert layer.packed[0].length == 608 == layer.packed_count(628)
    assert layer.packed[0].parts["values"].shape[2] <= 608 + 64
    assert layer.keys.shape[2] == 20 and layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


def test_channels_of_another_shape_are_refused() -> None:
    layer = PackedCacheLayer(KVConfig(), Channels.natural(2, 8), Channels.natural(2, 16))
    with pytest.raises(PermpruneError, match="keys of 2 heads of 8 channels, and the model has 2 of 16"):
        call(layer, random_states(1, 2, 1, 3, (16, 16)), None)
    with pytest.raises(
        PermpruneError,
        match="2:4 does not divide the 6 channels of a head: choose an M that divides 6, or 1:6, the default",
    ):
        call(PackedCacheLayer(PLAIN), random_states(1, 2, 1, 3, (6, 6)), None)


def test_keys_without_means_need_scores_that_may_all_change_alike() -> None:
    layer = PackedCacheLayer(CODED, *coded())
    call(layer, random_states(1, 2, 1, 9, (8, 8)), None)
    with pytest.raises(PermpruneError, match="keys without their means"):
        call(layer, random_states(1, 2, 1, 1, (8, 8)), None, softcap=5.0)


def test_scores_may_exceed_the_largest_fp16() -> None:
    layer = PackedCacheLayer(PLAIN.replace(keys="dense", values="dense", window=8))
    states = [(part + 100).half() for part in random_states(1, 2, 1, 60, (16, 16))]
    call(layer, [part[:, :, :40] for part in states], None)
    mask = causal_mask(torch.zeros(1), 40, 20)
    read = call(layer, [part[:, :, 40:] for part in states], mask)
    query, keys, values = (part.double() for part in states)
    expected = F.scaled_dot_product_attention(query[:, :, 40:], keys, values, mask).transpose(1, 2)
    torch.testing.assert_close(read.double(), expected, rtol=2e-3, atol=0)


def test_dropout_is_refused() -> None:
    layer = filled(KVConfig(), 60)
    with pytest.raises(PermpruneError, match="call model"):
        call(layer, random_states(2, 2, 1, 1, (16, 16)), None, dropout=0.1)


@pytest.mark.parametrize("read", [torch.relu, lambda keys: keys.transpose(1, 2), lambda keys: keys[:, 0], list])
def test_a_model_that_reads_the_cache_by_itself_is_told_so(read: Callable[[Any], Any]) -> None:
    keys, _ = PackedCacheLayer(KVConfig()).update(*random_states(1, 2, 1, 3, (16, 16))[1:])
    assert keys.shape == (1, 2, 3, 16)
    with pytest.raises(PermpruneError, match="attention interface"):
        read(keys)


def test_tokens_may_come_in_inference_mode_and_after_it() -> None:
    layer = PackedCacheLayer(PLAIN.replace(window=8))
    states = random_states(2, 2, 1, 30, (16, 16))
    with torch.inference_mode():
        call(layer, states, None)
        layer.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        for _ in range(9):
            call(layer, [t[:, :, :1] for t in states], None)
    assert layer.packed is not None and layer.packed[0].length == 24


def test_packed_tokens_hold_no_graph() -> None:
    layer = PackedCacheLayer(PLAIN.replace(window=8))
    call(layer, [t.requires_grad_() for t in random_states(2, 2, 1, 30, (16, 16))], None)
    assert layer.packed is not None and layer.packed[0].length == 16
    assert not any(part.requires_grad for packed in layer.packed for part in packed.parts.values())


@pytest.mark.parametrize("exact", [False, True])
def test_with_left_padding_the_first_tokens_that_are_read_stay_whole(exact: bool) -> None:
    torch.manual_seed(0)
    config, padding = PLAIN.replace(window=8, sinks=4), torch.tensor([0, 3, 16, 38, 50])
    layer = PackedCacheLayer(config, random_channels(2, 16), random_channels(2, 16), exact)
    held: list[list[Tensor]] = []
    for new in (41, 1, 30, 1):  # the last row begins in the third call
        past = layer.get_seq_length()
        held.append(random_states(5, 2, 1, new, (16, 16)))
        call(layer, held[-1], causal_mask(padding, past, new))
    keys, values = (torch.cat(parts, 2) for parts in list(zip(*held, strict=True))[1:])
    for channels, states, whole in zip(layer.channels, (keys, values), (layer.keys, layer.values), strict=True):
        assert channels is not None
        for row, first in enumerate(padding.tolist()):
            expected = channels.arrange(states[row : row + 1, :, first : first + 4])
            assert torch.equal(whole[row : row + 1, :, :4], expected)
    layer.crop(-10)
    layer.reorder_cache(torch.tensor([4, 0]))
    assert layer.places is not None and layer.places.shape == (2, 63)
    with pytest.raises(PermpruneError, match="cropped into left padding"):
        layer.crop(-20)
    assert layer.places.shape == (2, 63) == (2, layer.get_seq_length())
    layer.reset()
    call(layer, random_states(1, 2, 1, 40, (16, 16)), None)
    assert layer.places is None


def assert_rows_read_what_they_read_alone(
    layers: list[PackedCacheLayer], calls: list[int], widths: tuple[int, int], **close: float
) -> None:
    """The first layer reads three rows with left padding, in calls of so many tokens; each other one a row alone."""
    layer, *alone = layers
    past = 0
    for new in calls:
        states = random_states(3, 2, 2, new, widths)
        found = call(layer, states, causal_mask(PADDING, past, new))
        for row, first in enumerate(PADDING.tolist()):
            skipped = max(0, first - past)
            own = [t[row : row + 1, :, skipped:] for t in states]
            mask = causal_mask(torch.zeros(1), past + skipped - first, new - skipped)
            torch.testing.assert_close(found[row, skipped:], call(alone[row], own, mask)[0], **close)
        past += new


@settings(max_examples=20)
@given(configs, st.booleans(), st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 2**32))
def test_a_row_with_left_padding_reads_what_it_reads_alone(
    config: KVConfig, exact: bool, calls: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    channels = random_channels(2, 8), random_channels(2, 16)
    layers = [PackedCacheLayer(config, *channels, exact) for _ in range(4)]
    assert_rows_read_what_they_read_alone(layers, [32, *calls], (8, 16), **CLOSE)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_queries_read_keys_and_values_in_few_bits_with_their_means(kernel: str, softcap: float | None) -> None:
    channels = coded_channels([4, 4], 8, moving=softcap is None), coded_channels([3, 3], 8)
    layer, states = PackedCacheLayer(CODED, *channels), random_states(2, 2, 2, 60, (8, 8))
    call(layer, [t[:, :, :50] for t in states], None, softcap=softcap)
    read = []
    for own, whole in zip(channels, states[1:], strict=True):
        mean = 0.0 if own.moving is None else own.moving.at(torch.arange(60)[None])
        assert own.bits is not None
        parts = code(own.arrange(whole - mean), int(own.bits[0]))
        found = own.restore(decode(parts, int(own.bits[0]), 8)) + mean
        read.append(torch.cat((whole[:, :, :2], found[:, :, 2:42], whole[:, :, 42:]), 2))
    for first, last in ((50, 51), (51, 60)):
        part = [states[0][:, :, first:last], *(t[:, :, first:last] for t in states[1:])]
        module = nn.Identity()
        module.num_key_value_groups = 2
        mask = causal_mask(torch.zeros(2), first, last - first)
        expected = attention(module, part[0], *(t[:, :, :last] for t in read), mask, softcap=softcap)[0]
        torch.testing.assert_close(call(layer, part, mask, softcap=softcap), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exact", [False, True])
def test_in_few_bits_a_row_with_left_padding_reads_what_it_reads_alone(kernel: str, exact: bool) -> None:
    channels = coded()
    layers = [PackedCacheLayer(CODED, *channels, exact) for _ in range(4)]
    assert_rows_read_what_they_read_alone(layers, [40, 1, 30, 1], (8, 8), rtol=1e-4, atol=1e-4)
    (layer, *alone), rows = layers, torch.tensor([2, 0])
    layer.crop(-3)
    layer.reorder_cache(rows)
    states = random_states(2, 2, 2, 1, (8, 8))
    found = call(layer, states, causal_mask(PADDING[rows], layer.get_seq_length(), 1))
    for row, which in enumerate(rows.tolist()):
        alone[which].crop(-3)
        expected = call(alone[which], [t[row : row + 1] for t in states], None)
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-4)


def test_sums_are_fp32_whatever_the_default_type_is() -> None:
    config, outputs = KVConfig("2:4", "2:4", window=4, sinks=1), []
    states, token = random_states(1, 2, 2, 40, (16, 16)), random_states(1, 2, 2, 1, (16, 16))
    channels = random_channels(2, 16), random_channels(2, 16)
    for dtype in (torch.float32, torch.bfloat16):
        layer = PackedCacheLayer(config, *copy.deepcopy(channels))
        call(layer, states, None)
        torch.set_default_dtype(dtype)
        try:
            outputs.append(call(layer, token, None))
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*outputs)
