"""Training between the rounds, against Adam written out."""

import torch
from transformers import LlamaForCausalLM

from permprune.config import PruneConfig
from permprune.losses.objective import Objective
from permprune.permuters.tuning import BETAS, train_weights
from permprune.pipeline import prepare

WINDOWS = torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(1))


def test_every_step_takes_the_gradient_where_the_last_one_ended(tiny_llama: LlamaForCausalLM) -> None:
    config = PruneConfig(mode="gather", precision="fp32", measured=6, held_out=4)
    prepared = prepare(tiny_llama, None, config, examples=WINDOWS)
    network, run, rate = prepared.network, prepared.run, 1e-2
    expected = {name: weight.clone() for name, weight in network.dense.items()}
    first = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    second = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    for step, height in enumerate([rate * 2 / 3, rate * 2 / 3, rate * 2 / 9]):  # at 1/6, 1/2 and 5/6 of the way
        network.set_weights({name: weight.clone() for name, weight in expected.items()})
        for name, gradient in network.gradients(run.batch(5 + step, 4), Objective()).weight.items():
            own = gradient * network.masks[name]
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * own
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * own**2
            mean, square = first[name] / (1 - BETAS[0] ** (step + 1)), second[name] / (1 - BETAS[1] ** (step + 1))
            expected[name] -= height * mean / (square.sqrt() + 1e-8)
    network.set_weights({})
    shown = dict(network.shown)
    found = train_weights(network, run, Objective(), first=5, steps=3, examples=4, rate=rate)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0)
        assert torch.equal(network.shown[name], shown[name])
