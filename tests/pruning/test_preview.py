"""The few weights that the report shows before and after."""

import torch
from transformers import LlamaForCausalLM

from permprune.config import PruneConfig
from permprune.engine.held import Held, prepare
from permprune.pattern import Pattern
from permprune.permuters.registry import permuter

WINDOWS = torch.randint(128, (12, 16), generator=torch.Generator().manual_seed(0))


def test_the_layer_that_gains_most_is_shown_in_both_orders(tiny_llama: LlamaForCausalLM) -> None:
    config = PruneConfig(pattern="2:4", precision="fp32", measured=4, held_out=2)
    prepared = prepare(tiny_llama, None, config, examples=WINDOWS)
    network = prepared.network
    natural = network.measures()
    solution = permuter("ria").solve(network, prepared.run)
    columns, found = network.stored_columns(), dict(network.scores)
    pruned = Held(prepared, None).finish(solution, natural)
    shown = pruned.sample
    assert shown is not None
    gains = {row.name: row.kept - row.kept_none for row in pruned.layers}
    assert gains[shown["layer"]] == max(gains.values()) > 0
    scores = found[shown["layer"]]
    rows = torch.linspace(0, len(scores) - 1, 12).long()
    for key, order in (("natural", torch.arange(scores.shape[1])), ("permuted", columns[shown["layer"]])):
        kept, score = (torch.tensor(shown[key][what]) for what in ("kept", "score"))
        expected = scores[rows][:, order[:32]]
        assert kept.shape == score.shape == (12, 32) and int(score.min()) >= 0 and int(score.max()) == 100
        assert torch.equal(kept.bool(), Pattern(2, 4).mask(expected))
        assert int(score.argmin()) == int(expected.argmin()) or int(score.min()) == 0
