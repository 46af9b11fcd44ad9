"""The mix of patterns: its size, its choice, and that it goes through the whole pipeline."""

import itertools

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from permprune.config import PruneConfig
from permprune.engine.held import Held, Prepared, prepare
from permprune.errors import PermpruneError
from permprune.pattern import TOTAL, Pattern, parse_pattern
from permprune.permuters.registry import PERMUTERS
from permprune.pruning.allocation import CHOICES, least_error, tied
from permprune.pruning.problem import Part, Problem

from ..permuters.test_permuters import brief

WINDOWS = torch.randint(128, (12, 16), generator=torch.Generator().manual_seed(0))


def ready(model: LlamaForCausalLM, **settings: object) -> Prepared:
    return prepare(
        model,
        None,
        PruneConfig(pattern="mixed", precision="fp32", measured=4, held_out=2, **settings),
        examples=WINDOWS,
    )  # type: ignore[arg-type]


def density(prepared: Prepared) -> float:
    sizes = {layer.name: layer.weight.numel() for layer in prepared.layers}
    kept = sum(prepared.network.patterns[name].density * size for name, size in sizes.items())
    return kept / sum(sizes.values())


def test_a_mix_is_named_like_a_pattern() -> None:
    assert parse_pattern("mixed") == TOTAL and parse_pattern("4:8") == Pattern(4, 8)
    with pytest.raises(PermpruneError, match="not an N:M pattern"):
        parse_pattern("mixture")


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_within_the_budget(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = generator.choice([64, 128, 192, 512], 6)
    errors = np.sort(generator.exponential(size=(6, 3)) ** 3, axis=1)[:, ::-1] * 1e-7
    kept = np.array([pattern.density for pattern in CHOICES])

    def cost(choices: tuple[int, ...]) -> float:
        within = sizes @ kept[list(choices)] <= TOTAL.density * sizes.sum()
        return errors[range(6), choices].sum() if within else np.inf

    best = min(cost(choices) for choices in itertools.product(range(3), repeat=6))
    assert cost(tuple(least_error(errors, sizes))) == pytest.approx(best, rel=1e-4)


def test_layers_that_share_an_order_are_tied() -> None:
    def problem(*names: str) -> Problem:
        return Problem("p", 8, tuple(Part(name, "site", torch.arange(8)) for name in names))

    groups = tied(["a", "b", "c", "d", "e"], [problem("a", "b"), problem("c"), problem("b", "d")])
    assert sorted(map(sorted, groups)) == [["a", "b", "d"], ["c"], ["e"]]


@pytest.mark.parametrize("mode", ["fold", "gather"])
def test_a_mix_keeps_as_much_as_its_pattern_where_the_loss_feels_it(tiny_llama: LlamaForCausalLM, mode: str) -> None:
    loud = tiny_llama.model.layers[1].mlp.down_proj
    loud.weight.data *= 50
    prepared = ready(tiny_llama, mode=mode)
    patterns = prepared.network.patterns
    assert patterns["model.layers.1.mlp.down_proj"] == CHOICES[-1]
    assert len(set(patterns.values())) > 1 and density(prepared) <= TOTAL.density
    for problem in prepared.problems:
        assert {patterns[part.layer] for part in problem.parts} == {prepared.network.pattern_of(problem)}
    if mode == "fold":
        assert patterns["model.layers.0.self_attn.q_proj"] == patterns["model.layers.1.mlp.up_proj"]


@pytest.mark.slow
@pytest.mark.parametrize("method", PERMUTERS)
def test_every_permuter_searches_a_mix(tiny_llama: LlamaForCausalLM, method: str) -> None:
    tiny_llama.model.layers[0].self_attn.o_proj.weight.data *= 50
    prepared = ready(tiny_llama, mode="gather")
    network, patterns = prepared.network, prepared.network.patterns
    natural = network.measures()
    pruned = Held(prepared, None).finish(brief(method).solve(network, prepared.run), natural)
    assert [Pattern.parse(row.pattern) for row in pruned.layers] == list(patterns.values())
    for name, layer in network.layers.items():
        assert patterns[name].holds(layer.weight)
        assert layer.weight.ne(0).float().mean() == pytest.approx(patterns[name].density, abs=0.01)
