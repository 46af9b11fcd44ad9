"""Patterns of pairs: their orders, what else takes them, and what does not."""

import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM

from permprune.config import PruneConfig
from permprune.engine.held import Held, prepare
from permprune.engine.pruned import beside_natural, sample
from permprune.errors import PermpruneError
from permprune.inference.pack import pack
from permprune.kv.config import pattern_of
from permprune.pattern import Pattern
from permprune.permuters.base import Round
from permprune.permuters.kept import ria_order
from permprune.permuters.registry import permuter

PAIRS = Pattern(4, 8, 2)
WINDOWS = torch.randint(128, (12, 16), generator=torch.Generator().manual_seed(0))


def kept_energy(score: torch.Tensor, order: torch.Tensor) -> float:
    ordered = score[order].T
    return float((ordered.square() * PAIRS.mask(ordered)).sum() / score.square().sum())


def test_channels_that_are_large_together_become_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    large = torch.rand(16, 200, generator=generator) < 0.5
    score = (0.1 + large) * (0.5 + torch.rand(16, 200, generator=generator))
    mates = torch.randperm(32, generator=generator)
    score = score.repeat(2, 1)[mates]  # of every channel there are two alike
    order = ria_order(lambda: score.split(7, 1), PAIRS)
    same = [int(mates[a] % 16) == int(mates[b] % 16) for a, b in order.view(-1, 2).tolist()]
    assert all(same)
    assert kept_energy(score, order) > kept_energy(score, torch.arange(32)) + 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("method", "train"), [("ria", "none"), ("newton:rounds=2:examples=2", "steps=1")])
def test_a_model_of_pairs_is_searched_updated_and_packed(tiny_llama: LlamaForCausalLM, method: str, train: str) -> None:
    recipe = {"order": method, "update": "sparsegpt", "train": train}
    config = PruneConfig(pattern="4:8p", mode="gather", precision="fp32", **recipe)
    held = Held(prepare(tiny_llama, None, config, examples=WINDOWS), None)
    natural = held.natural()
    solution = held.run(config.recipe, held.plan.run)
    pruned = held.finish(solution, natural)
    assert all(row.pattern == "4:8p" and PAIRS.holds(held.network.layers[row.name].weight) for row in pruned.layers)
    said = tiny_llama(WINDOWS).logits
    assert pack(tiny_llama, {row.name: row.pattern for row in pruned.layers}, dtype="fp32") == []
    torch.testing.assert_close(tiny_llama(WINDOWS).logits, said, rtol=1e-4, atol=1e-4)


def test_the_sample_of_a_report_shows_the_masks_of_pairs(tiny_llama: LlamaForCausalLM) -> None:
    network = prepare(tiny_llama, None, PruneConfig(pattern="4:8p", precision="fp32"), examples=WINDOWS).network
    measures = network.measures()
    shown = sample(network, beside_natural(measures, measures))
    kept, mask = torch.tensor(shown["natural"]["kept"]), network.masks[shown["layer"]]
    rows = torch.linspace(0, len(mask) - 1, len(kept)).long()
    assert torch.equal(kept.bool(), mask[rows, : kept.shape[1]])


def test_what_keeps_single_weights_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    prepared = prepare(tiny_llama, None, PruneConfig(pattern="4:8p", precision="fp32"), examples=WINDOWS)
    told = list[Round]()
    with pytest.raises(PermpruneError, match="cp keeps single weights"):
        permuter("cp").solve(prepared.network, dataclasses.replace(prepared.run, callbacks=(told.append,)))
    assert not told  # before the first round
    with pytest.raises(PermpruneError, match="pairs of weights"):
        pattern_of("4:8p", 64)
