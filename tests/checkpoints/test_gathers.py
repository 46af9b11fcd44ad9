"""Gathers one after the other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from permprune.checkpoints.gathers import Gather, attach_gathers, compose, detach_gathers, gather_buffers
from permprune.checkpoints.schema import Malformed

WIDTH = 6
ORDERS = st.permutations(range(WIDTH)).map(list)
READERS = st.lists(st.sampled_from(["0", "2"]), min_size=1, max_size=2, unique=True)
GATHERS = st.builds(Gather, st.sampled_from("ab"), st.just(""), READERS, ORDERS) | st.builds(
    Gather, st.sampled_from("ab"), st.sampled_from(["0", "1", "2"]), st.just([]), ORDERS
)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), Conv1D(WIDTH, WIDTH)).eval()


@given(st.lists(GATHERS, max_size=4), st.lists(GATHERS, max_size=4))
def test_composed_gathers_do_what_one_after_the_other_do(first: list[Gather], then: list[Gather]) -> None:
    apart, together, x = network(), network(), torch.randn(3, WIDTH)
    for gather in (*first, *then):
        attach_gathers(apart, [gather])
    composed = compose(first, then)
    attach_gathers(together, composed)
    assert torch.equal(apart(x), together(x))
    places = [place for gather in composed for place in gather.places]
    assert len(places) == len(set(places)) and bool(gather_buffers(together)) == bool(places)
    assert {place: order.tolist() for place, order in detach_gathers(together).items()} == {
        place: gather.order for gather in composed for place in gather.places
    }
    assert torch.equal(together(x), network()(x))


@pytest.mark.parametrize(
    ("output", "inputs", "size"),
    [("1", [], 5), ("0", [], 7), ("2", [], 1), ("", ["0"], 5), ("", ["2"], 7), ("3", [], 6), ("", ["1"], 6)],
)
def test_gathers_that_do_not_fit_are_refused(output: str, inputs: list[str], size: int) -> None:
    with pytest.raises(Malformed, match="gather"):
        attach_gathers(network(), [Gather("site", output, inputs, list(range(size)))])


def test_a_gather_has_one_kind_of_place() -> None:
    for output, inputs in (("", []), ("0", ["2"]), ("", [""])):
        with pytest.raises(Malformed, match="either an output or inputs"):
            Gather("site", output, inputs, [0])
