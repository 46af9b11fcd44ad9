"""The mix of patterns: its budget, its choice, and that it goes through the whole pipeline."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from permprune.budget.asked import frame_of, parse_candidates
from permprune.budget.sensitivity import layer_costs
from permprune.config import PruneConfig
from permprune.engine.held import Held, prepare
from permprune.errors import PermpruneError
from permprune.inference.pack import pack, packed_bytes
from permprune.pattern import Pattern
from permprune.permuters.base import Permuter
from permprune.permuters.quadratic import QuadraticModel
from permprune.permuters.registry import PERMUTERS
from permprune.recipe import Recipe
from permprune.training.train import Training
from permprune.updates.methods import NoUpdate

from ..permuters.test_permuters import FOLDED, brief

WINDOWS = torch.randint(128, (20, 16), generator=torch.Generator().manual_seed(0))
QUIET = "model.layers.1.mlp.up_proj"


def order(permuter: Permuter) -> Recipe:
    """The recipe of an order alone."""
    return Recipe(permuter, NoUpdate(), Training())


def ready(
    model: LlamaForCausalLM, partial: Path | None = None, windows: torch.Tensor = WINDOWS, **settings: Any
) -> Held:
    settings = {"pattern": "mixed", "precision": "fp32", "measured": 4, "held_out": 4, **settings}
    return Held(prepare(model, None, PruneConfig(**settings), examples=windows, partial=partial), None)


def spoken(model: LlamaForCausalLM) -> torch.Tensor:
    """Windows that a model has written, after its layers and logits are made larger: pruning now costs it loss."""
    for layer in [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]:
        layer.weight.data *= 8
    model.lm_head.weight = torch.nn.Parameter(30 * model.lm_head.weight.detach())
    prompts = torch.arange(60)[:, None]
    written = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), min_new_tokens=15, max_new_tokens=15, do_sample=True
    )
    return torch.as_tensor(written)


def kept(held: Held) -> float:
    """The share of the weights that the patterns keep."""
    sizes = {layer.name: layer.weight.numel() for layer in held.all_layers.outline.layers}
    assert held.mix is not None
    density = {name: pattern.density for name, pattern in held.mix.patterns.items()}
    total = sum(
        layer.weight.numel() for layer in held.model.model.layers.modules() if isinstance(layer, torch.nn.Linear)
    )
    return (sum(sizes[name] * density[name] for name in sizes) + total - sum(sizes.values())) / total


def test_the_groups_of_a_mix_contain_those_of_its_candidates() -> None:
    candidates = parse_candidates(["2:4", "dense", "6:8", "1:4"])
    assert candidates == (Pattern(1, 4), Pattern(2, 4), Pattern(6, 8), None)
    assert frame_of(candidates, 0.6) == Pattern(5, 8) and frame_of(candidates[:2], 0.5) == Pattern(2, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.6, "bytes": 0.5}, "two budgets"),
        ({"keep": 0.6, "pattern": "2:4"}, "is for a mix"),
        ({"candidates": ("2:4", "dense"), "pattern": "2:4"}, "is for a mix"),
        ({"keep": 0.2}, "keeps 0.25"),
        ({"keep": 1.0}, "every layer would be dense"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"candidates": ("2:4",)}, "two candidates"),
        ({"candidates": ("2:4", "half")}, "not an N:M pattern"),
        ({"max_loss": 0.0}, "max_loss is 0.0"),
    ],
)
def test_bad_budgets_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PermpruneError, match=message):
        PruneConfig(**{"pattern": "mixed", **settings})


def test_one_pattern_has_no_settings_of_a_mix() -> None:
    assert "keep" not in PruneConfig().to_json() and PruneConfig(pattern="mixed").to_json()["keep"] is None


@pytest.mark.parametrize("mode", ["fold", "gather"])
@pytest.mark.parametrize("share", [0.4, 0.75])
def test_a_mix_keeps_to_its_budget_and_what_the_loss_feels(
    tiny_llama: LlamaForCausalLM, mode: str, share: float
) -> None:
    tiny_llama.get_submodule(QUIET).weight.data /= 50
    held = ready(tiny_llama, windows=spoken(tiny_llama), mode=mode, keep=share, held_out=16)
    assert held.mix is not None
    assert share - 0.1 < kept(held) <= share and kept(held) == pytest.approx(held.mix.keep)
    densities = {name: held.mix.patterns[name].density for name in held.mix.patterns}
    assert len({*held.mix.layers.values()}) > 1 and densities[QUIET] == min(densities.values())
    assert held.mix.rounds[-1] < held.mix.uniform["3:8" if share < 0.5 else "6:8"]
    assert [point.keep for point in held.mix.curve] == sorted(point.keep for point in held.mix.curve)
    assert held.network.patterns == held.mix.patterns
    if mode == "fold" and share < 0.5:  # layers that share the order of the residual stream
        problem = max(held.plan.outline.problems, key=lambda one: len(one.parts))
        assert len({held.network.patterns[part.layer] for part in problem.parts}) > 1


def test_a_mix_that_loses_more_than_one_pattern_is_not_chosen(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("permprune.budget.allocate.layer_costs", lambda slopes, losses: -layer_costs(slopes, losses))
    held = ready(tiny_llama, windows=spoken(tiny_llama), candidates=("dense", "4:8", "1:8"), keep=0.5)
    assert held.mix is not None
    assert {*held.mix.layers.values()} == {"4:8"} and held.mix.rounds == [held.mix.uniform["4:8"]]
    assert "4:8 in every layer" in caplog.text


@pytest.mark.parametrize("budget", [0.8, 36_000.0])
def test_a_mix_keeps_to_its_bytes(tiny_llama: LlamaForCausalLM, budget: float) -> None:
    held = ready(tiny_llama, mode="gather", bytes=budget)
    assert held.mix is not None
    dense = 2 * sum(parameter.numel() for parameter in tiny_llama.parameters())
    natural = held.natural()
    pruned = held.finish(held.run(order(brief("newton")), held.plan.run), natural)
    size = packed_bytes(tiny_llama, {row.name: row.pattern for row in pruned.layers}, pruned.gathers)
    assert size is not None and size <= held.mix.bytes <= (budget if budget > 1 else budget * dense)
    pack(tiny_llama, {row.name: row.pattern for row in pruned.layers})
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in tiny_llama.state_dict().values()}
    assert sum(tensors.values()) <= size


def test_what_does_not_fit_is_one_line(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(PermpruneError, match="the packed model takes at least"):
        ready(tiny_llama, bytes=20_000)


def test_an_interrupted_run_keeps_the_patterns(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ready(tiny_llama, tmp_path, keep=0.6)
    solution = first.run(order(brief("newton")), first.plan.run)
    first.restore()
    monkeypatch.setattr("permprune.engine.held.sensitivity", None)
    again = ready(tiny_llama, tmp_path, keep=0.6)
    assert again.mix == first.mix
    found = again.run(order(brief("newton")), again.plan.run)
    assert found.curve == solution.curve
    with pytest.raises(PermpruneError, match="another keep"):
        ready(tiny_llama, tmp_path, keep=0.7)


def test_a_swap_changes_layers_with_several_patterns_as_predicted(tiny_llama: LlamaForCausalLM) -> None:
    """The model of an order that layers of 6:8, 2:4 and 1:4 share is exact, as it is for one pattern."""
    held = ready(tiny_llama, candidates=("6:8", "2:4", "1:4"), keep=0.5)
    network = held.network
    problem = max(network.problems, key=lambda one: len(one.parts))
    cycle = itertools.cycle([Pattern(6, 8), Pattern(2, 4), Pattern(1, 4)])
    network.set_patterns({name: next(cycle) for name in network.layers})
    assert network.pattern_of(problem).m == 8

    def error(order: torch.Tensor) -> float:
        network.set_orders({problem.name: order})
        total = 0.0
        for part in problem.parts:
            pruned = network.dense[part.layer] * ~network.masks[part.layer]
            moments = network.statistics.moments[part.site]
            total += float(((pruned @ moments) * pruned).sum(1) @ network.statistics.fisher[part.layer]) / 2
        return total

    model = QuadraticModel.of(network, problem, network.statistics.fisher, order=problem.identity())
    before = error(problem.identity())
    model.swap(torch.Generator().manual_seed(0), 4)
    assert model.change < 0
    assert error(model.order) - before == pytest.approx(model.change, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "mode"), [*itertools.product(PERMUTERS, ["gather"]), *itertools.product(FOLDED, ["fold"])]
)
def test_every_permuter_searches_a_mix(tiny_llama: LlamaForCausalLM, method: str, mode: str) -> None:
    held = ready(tiny_llama, mode=mode, keep=0.6)
    natural = held.natural()
    pruned = held.finish(held.run(order(brief(method)), held.plan.run), natural)
    assert pruned.record().mix == held.mix
    for row in pruned.layers:
        pattern, layer = Pattern.parse(row.pattern), held.network.layers[row.name]
        assert pattern.holds(layer.weight)
        assert layer.weight.ne(0).float().mean() == pytest.approx(pattern.density, abs=0.01)
