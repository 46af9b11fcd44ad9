"""Sites found by watching a model run, where it cannot be traced."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permprune.coupling.discovery import discover, observe
from permprune.errors import PermpruneError
from permprune.models.layers import Layer, block_linears, linears_of

from .coupling_models import llama, mixtral, tokens

X = {"x": torch.randn(3, 6, generator=torch.Generator().manual_seed(2))}


def layers(model: nn.Module) -> list[Layer]:
    return [layer for name, module in model.named_modules() for layer in linears_of(name, module)]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.idle = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) + self.second(x)
        return self.third(F.relu(y)) if x.sum() > -100 else self.idle(y)


def test_linears_that_read_the_same_tensor_share_a_site() -> None:
    model = Branches()
    sites = {site.name: site for site in observe(model, X, layers(model)).sites}
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

    model = Twice()
    (site,) = observe(model, X, layers(model)).sites
    assert site.readers == ("twice.weight", "once.weight")


def test_watching_finds_the_groups_that_tracing_finds() -> None:
    model = llama()
    traced = {site.readers for site in discover(model, tokens()).sites if site.readers != ("lm_head.weight",)}
    assert {site.readers for site in observe(model, tokens(), block_linears(model)).sites} == traced
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_that_does_not_run_is_refused() -> None:
    with pytest.raises(PermpruneError, match="neither traced nor run"):
        observe(model := Branches(), {"x": torch.zeros(3, 5)}, layers(model))


def test_all_experts_of_a_layer_read_one_tensor() -> None:
    model = mixtral()
    sites = {site.readers: site.size for site in observe(model, tokens(), block_linears(model)).sites}
    for number in range(2):
        experts = f"model.layers.{number}.mlp.experts"
        assert sites[(f"{experts}.gate_up_proj",)] == 32
        assert sites[(f"{experts}.down_proj",)] == 48
