"""Sites found by watching a model run, where it cannot be traced."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permprune.coupling.discovery import discover
from permprune.coupling.observe import observe
from permprune.errors import PermpruneError

from .coupling_models import llama, tokens

X = {"x": torch.randn(3, 6, generator=torch.Generator().manual_seed(2))}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.idle = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) + self.second(x)
        return self.third(F.relu(y)) if x.sum() > -100 else self.idle(y)


def test_linears_that_read_the_same_tensor_share_a_site() -> None:
    sites = {site.name: site for site in observe(Branches(), X, ["first", "second", "third", "idle"]).sites}
    assert {name: site.readers for name, site in sites.items()} == {
        "input": ("first.weight", "second.weight"),
        "third.input": ("third.weight",),
    }
    assert all((site.size, site.gather) == (6, ("input",)) for site in sites.values())


def test_tensors_read_by_one_linear_are_one_site() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.once = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.twice(x))
            return self.twice(y) + self.once(y)

    (site,) = observe(Twice(), X, ["twice", "once"]).sites
    assert site.readers == ("twice.weight", "once.weight")


def test_watching_finds_the_groups_that_tracing_finds() -> None:
    model = llama()
    traced = {site.readers for site in discover(model, tokens()).sites if site.readers != ("lm_head.weight",)}
    linears = [weight.removesuffix(".weight") for readers in traced for weight in readers]
    assert {site.readers for site in observe(model, tokens(), linears).sites} == traced
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_that_does_not_run_is_refused() -> None:
    with pytest.raises(PermpruneError, match="neither traced nor run"):
        observe(Branches(), {"x": torch.zeros(3, 5)}, ["first"])
