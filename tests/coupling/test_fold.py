"""Folding itself: the formula, the checks, and ties."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from permprune.coupling.discovery import discover
from permprune.coupling.fold import fold, fold_all, fold_parameter, verify_space
from permprune.coupling.space import ChannelSpace, Member
from permprune.errors import PermpruneError

from .coupling_models import llama, randomised, tokens


def space_of(positions: torch.Tensor, dims: tuple[int, ...] = (0,), **changes) -> ChannelSpace:
    blocks, _, size = positions.shape
    fields = {
        "name": "space", "size": size, "blocks": blocks, "freedom": "free" if blocks == 1 else "blocks",
        "members": (Member("weight", dims, positions, "scales"),),
    }  # fmt: skip
    return ChannelSpace(**{**fields, **changes})


def holder(*shape: int) -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape))
    return model


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([(0,), (1,), (0, 1), (0, 2)]),
    st.data(),
)
def test_fold_is_the_formula_and_its_inverse_undoes_it(blocks, copies, size, dims, data):
    shape = [2, 3, 4]
    if len(dims) == 1:
        shape[dims[0]] = blocks * copies * size
    else:
        shape[dims[0]], shape[dims[1]] = blocks, copies * size
    order = torch.tensor(data.draw(st.permutations(range(blocks * copies * size))))
    positions = order.view(blocks, copies, size)
    table = torch.tensor([data.draw(st.permutations(range(size))) for _ in range(blocks)])
    model = holder(*shape)
    before = model.weight.detach().clone()
    space = space_of(positions, dims)
    fold(model, space, table)

    def flat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.movedim(dims, tuple(range(len(dims)))).reshape(blocks * copies * size, -1)

    for b in range(blocks):
        for c in range(copies):
            for i in range(size):
                new = flat(model.weight.detach())[positions[b, c, i]]
                assert torch.equal(new, flat(before)[positions[b, c, table[b, i]]])
    fold(model, space, table.argsort(dim=-1))
    assert torch.equal(model.weight, before)


BAD_TABLES = {
    "repeated": torch.tensor([[0, 1, 1, 3]]),
    "out of range": torch.tensor([[0, 1, 2, 4]]),
    "short": torch.tensor([[0, 1, 2]]),
    "blocks": torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]]),
    "float": torch.tensor([[0.0, 1.0, 2.0, 3.0]]),
}


@pytest.mark.parametrize("table", BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_bad_table_is_refused(table):
    with pytest.raises(PermpruneError, match="table of space"):
        fold(holder(4), space_of(torch.arange(4).view(1, 1, 4)), table)


BAD_SPACES = {
    "frozen": (
        space_of(torch.arange(4).view(1, 1, 4), freedom="frozen", reason="cumsum in x"),
        "cumsum in x",
    ),
    "beyond": (space_of(torch.arange(2, 6).view(1, 1, 4)), "do not fit weight"),
    "overlap": (space_of(torch.tensor([[[0, 1, 2, 3], [3, 2, 1, 0]]])), "do not fit weight"),
    "dimension": (space_of(torch.arange(4).view(1, 1, 4), dims=(1,)), "no dimension 1"),
    "name": (
        space_of(
            torch.arange(4).view(1, 1, 4),
            members=(Member("bias", (0,), torch.arange(4).view(1, 1, 4), "scales"),),
        ),
        "no parameter bias",
    ),
}


@pytest.mark.parametrize(("space", "message"), BAD_SPACES.values(), ids=BAD_SPACES)
def test_a_space_that_does_not_fit_is_refused(space, message):
    model = holder(4)
    with pytest.raises(PermpruneError, match=message):
        fold(model, space, torch.tensor([3, 2, 1, 0]))
    assert torch.equal(model.weight, torch.arange(4.0))


def test_verify_catches_a_wrong_space_and_puts_the_weights_back():
    model = randomised(llama())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    positions = torch.arange(24).view(1, 1, 24)
    name = "model.layers.0.self_attn.q_proj.weight"
    wrong = space_of(positions, members=(Member(name, (0,), positions, "writes"),))
    with pytest.raises(PermpruneError, match="bug in the coupling analysis"):
        verify_space(model, wrong, tokens())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_move_once_in_any_dtype(dtype):
    model = llama(tie_word_embeddings=True).to(dtype).eval()
    coupling = discover(model, tokens())
    (residual,) = [space for space in coupling.spaces if space.name.endswith("residual")]
    old = model.model.embed_tokens.weight.detach().clone()
    table = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    verify_space(model, residual, tokens())
    fold_all(model, {residual.name: table}, coupling)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, old[:, table])


def test_fold_all_checks_everything_before_it_moves_anything():
    model = randomised(llama())
    coupling = discover(model, tokens())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good, bad = coupling.spaces[0], coupling.spaces[1]
    table = torch.arange(good.size - 1, -1, -1)
    with pytest.raises(PermpruneError, match="shape"):
        fold_all(model, {good.name: table, bad.name: table}, coupling)
    with pytest.raises(PermpruneError, match="no space named"):
        fold_all(model, {good.name: table, "other": table}, coupling)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(PermpruneError, match="frozen"):
        fold_all(model, {good.name: table}, dataclasses.replace(coupling, spaces=(dataclasses.replace(
            good, freedom="frozen", reason="test"),)))  # fmt: skip


def test_parameters_folded_one_by_one_are_those_of_fold_all():
    model = randomised(llama())
    coupling = discover(model, tokens())
    generator = torch.Generator().manual_seed(0)
    tables = {
        space.name: torch.stack([torch.randperm(space.size, generator=generator) for _ in range(space.blocks)])
        for space in coupling.spaces
        if space.freedom != "frozen"
    }
    apart = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in apart.items():
        fold_parameter(name, parameter, tables, coupling)
    fold_all(model, tables, coupling)
    assert all(torch.equal(apart[name], parameter) for name, parameter in model.named_parameters())
