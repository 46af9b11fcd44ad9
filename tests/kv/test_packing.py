"""States in packed form."""

import pytest
import torch

from permprune.errors import PermpruneError
from permprune.kv.moving import Moving
from permprune.kv.packing import TURNS, Channels, StatesLayout, choose_channels, decode, encode
from permprune.pattern import Pattern

from .reference import pruned, random_channels

DTYPES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.int8: 1e-2}
"""Types of values, with their rounding errors beside the largest state."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "3:6"])
@pytest.mark.parametrize("recovery", ["zeros", "sign"])
def test_states_come_back_pruned(dtype: torch.dtype, text: str, recovery: str) -> None:
    channels, states = random_channels(3, 24), torch.randn(2, 3, 5, 24)
    layout = StatesLayout(Pattern.parse(text), dtype, recovery == "sign")
    found = decode(encode(channels.arrange(states), channels, layout), channels, layout, torch.float32)
    expected = pruned(states, channels, text, recovery)
    error = (channels.restore(found) - expected).abs().max()
    assert error <= DTYPES[dtype] * 2 * states.abs().max()


@pytest.mark.parametrize("text", ["2:4", "4:8", "12:24"])
def test_the_largest_weighted_channels_are_kept_without_recovery(text: str) -> None:
    channels, states, pattern = random_channels(3, 24), torch.randn(2, 3, 5, 24), Pattern.parse(text)
    kept, _ = choose_channels(states, channels, pattern, turns=0)
    score = (states.abs() * channels.weight[:, None]).unflatten(-1, (-1, pattern.m))
    threshold = score.sort(-1, descending=True).values[..., pattern.n - 1 : pattern.n]
    assert torch.equal(kept, (score >= threshold).flatten(-2))


@pytest.mark.parametrize("text", ["2:4", "4:8", "12:24"])
def test_channels_are_chosen_for_the_error_after_recovery(text: str) -> None:
    channels, states, pattern = random_channels(3, 24), torch.randn(2, 3, 50, 24), Pattern.parse(text)
    errors = []
    for turns in (0, TURNS):
        kept, size = choose_channels(states, channels, pattern, turns=turns)
        assert (kept.unflatten(-1, (-1, pattern.m)).sum(-1) == pattern.n).all()
        lost = (states.abs() - size * channels.level[:, None]) * channels.weight[:, None]
        errors.append(lost.masked_fill(kept, 0).square().sum(-1))
    assert (errors[1] <= errors[0] * 1.0001).all()
    assert errors[1].sum() < 0.8 * errors[0].sum()


def test_channels_that_are_recovered_well_are_pruned() -> None:
    states = torch.tensor([4.0, 1.0, 0.9, 0.0, 3.0, 1.0, 1.0, 3.0]).view(1, 1, 1, 8)
    kept, size = choose_channels(states, Channels.natural(1, 8), Pattern(2, 4), turns=TURNS)
    assert kept.flatten().tolist() == [True, False, False, True] * 2  # not [True, True, False, False, ...]
    assert float(size) == pytest.approx(0.975)


def test_sizes_are_those_of_the_description() -> None:
    channels, states = Channels.natural(2, 64), torch.randn(1, 2, 7, 64)
    bytes_of_token = {}
    for dtype in (torch.bfloat16, torch.int8):
        parts = encode(states, channels, StatesLayout(Pattern(2, 4), dtype, signs=True))
        assert all(part.shape[:3] == (1, 2, 7) for part in parts.values())
        bytes_of_token[dtype] = {name: part.nbytes // 14 for name, part in parts.items()}
    assert bytes_of_token[torch.bfloat16] == {"values": 64, "code": 8, "signs": 4, "amplitude": 2}
    assert bytes_of_token[torch.int8] == {"values": 32, "scale": 2, "code": 8, "signs": 4, "amplitude": 1}


def test_zeros_and_outliers_are_stored() -> None:
    channels = Channels.natural(1, 8)
    states = torch.tensor([[0.0] * 8, [1e4, 1e-4, 0, 0, 0, 0, 0, 0], [3e-5] * 8]).view(1, 1, 3, 8)
    for dtype in DTYPES:
        layout = StatesLayout(Pattern(2, 4), dtype, signs=True)
        found = decode(encode(states, channels, layout), channels, layout, torch.float32)
        assert found.isfinite().all()
        assert not found[0, 0, 0].any()
        assert float(found[0, 0, 1, 0]) == pytest.approx(1e4, rel=1e-2)


def test_damaged_channels_are_refused() -> None:
    whole = random_channels(2, 8)
    whole.check("kv")
    twice = whole.order.clone()
    twice[1, 0] = twice[1, 1]
    with pytest.raises(PermpruneError, match="kv has an order that is no permutation"):
        Channels(twice, whole.weight, whole.level).check("kv")
    for weight in (whole.weight * 0, whole.weight / 0, whole.weight[:, :4]):
        with pytest.raises(PermpruneError, match=r"not one number from 1e-06 to 1e\+06"):
            Channels(whole.order, weight, whole.level).check("kv")
    for mean in (whole.weight / 0, whole.weight[:, :4], whole.order):
        moving = Moving(whole.weight, mean, whole.weight)
        with pytest.raises(PermpruneError, match=r"kv has means that are not one number from -1e\+06"):
            Channels(whole.order, whole.weight, whole.level, moving=moving).check("kv")
    for bits in (torch.tensor([4, 7]), torch.tensor([4])):
        with pytest.raises(PermpruneError, match="kv does not have 2 to 6 bits for each head"):
            Channels(whole.order, whole.weight, whole.level, bits).check("kv")
