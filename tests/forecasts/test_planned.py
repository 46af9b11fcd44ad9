"""The forecast of a run whose data are known."""

from dataclasses import replace

import torch

from permprune.config import PruneConfig
from permprune.examples import Examples
from permprune.forecasts.run import forecast_plan
from permprune.plan import plan_run

from ..modalities import make


def test_the_lengths_of_all_texts_count_and_not_those_of_the_first_ones() -> None:
    lengths = torch.tensor([4] * 600 + [16] * 600)
    mask = (torch.arange(16) < lengths[:, None]).long()
    texts = Examples({"input_ids": torch.ones(1200, 16, dtype=torch.int64), "attention_mask": mask})
    model, config = make("bert"), PruneConfig(order="newton:rounds=1", measured=1, held_out=1)
    plan = plan_run(model, config, examples=texts, weights=model.state_dict())
    short, both, long = (
        forecast_plan(model, replace(plan, run=replace(plan.run, train=part)), 1).seconds["newton: gradients"] or 0.0
        for part in (texts[:600], texts, texts[600:])
    )
    assert short < both < long
