"""Discovery on real architectures: what it finds may be permuted, and every member of it is needed."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from permprune.coupling import ChannelSpace, Coupling, discover, fold, fold_all, inverse, verify
from permprune.errors import PermpruneError

from .coupling_models import FAMILIES, randomised


@pytest.fixture(scope="module", params=FAMILIES)
def found(request):
    family = FAMILIES[request.param]
    model = randomised(family.build())
    return family, model, discover(model, family.example())


def random_table(space: ChannelSpace, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(space.size, generator=generator) for _ in range(space.blocks)])


def movable(coupling: Coupling) -> list[ChannelSpace]:
    return [space for space in coupling.spaces if space.freedom != "frozen"]


def test_every_space_keeps_the_outputs_and_the_weights_come_back(found):
    family, model, coupling = found
    before = copy.deepcopy(model.state_dict())
    assert len(movable(coupling)) >= 3
    for space in movable(coupling):
        verify(model, space, family.example(), family.tolerance)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_all_spaces_together_keep_the_outputs(found):
    family, model, coupling = found
    permuted = copy.deepcopy(model)
    tables = {space.name: random_table(space, seed) for seed, space in enumerate(movable(coupling))}
    fold_all(permuted, tables, coupling)
    with torch.no_grad():
        before = model(**family.example())[0]
        after = permuted(**family.example())[0]
    assert (before - after).abs().max() <= family.tolerance * before.abs().max()
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), permuted.parameters(), strict=True))
    for space in reversed(movable(coupling)):
        fold(permuted, space, inverse(tables[space.name]))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), permuted.parameters(), strict=True))


def test_a_space_without_one_of_its_members_is_caught(found):
    family, model, coupling = found
    for space in movable(coupling):
        for left_out in space.members:
            rest = tuple(member for member in space.members if member is not left_out)
            if changes_nothing(space, left_out.parameter):
                continue
            with pytest.raises(PermpruneError, match="discovered wrongly"):
                verify(model, dataclasses.replace(space, members=rest), family.example(), family.tolerance)


def changes_nothing(space: ChannelSpace, parameter: str) -> bool:
    """A key's bias adds the same amount to all scores of a query, which softmax forgets."""
    return space.name.endswith("heads") and parameter.endswith(("key.bias", "k_proj.bias", "attn.k.bias"))


def test_frozen_spaces_say_why_and_free_ones_do_not(found):
    _, model, coupling = found
    for space in coupling.spaces:
        assert bool(space.reason) == (space.freedom == "frozen")
        assert space.readers
        assert (space.blocks > 1) == (space.freedom == "blocks")
        for member in space.members:
            assert member.positions.shape[::2] == (space.blocks, space.size)
            assert member.positions.dtype == torch.int64
            assert model.get_parameter(member.parameter) is not None


def test_names_are_unique_and_sites_fit_the_weights(found):
    _, model, coupling = found
    sites = {site.name: site for site in coupling.sites}
    assert len({space.name for space in coupling.spaces}) == len(coupling.spaces)
    assert len(sites) == len(coupling.sites)
    for site in coupling.sites:
        for reader in site.readers:
            assert site.size in model.get_parameter(reader).shape
        if site.gather[0] == "output":
            model.get_submodule(site.gather[1])
        else:
            assert site.gather == ("input",)
    for space in coupling.spaces:
        for reader in space.readers:
            assert reader.parameter in sites[reader.site].readers
