"""The seconds that the stages of a run are expected to take."""

from pathlib import Path
from typing import Any

import pytest

import permprune
from permprune.config import PruneConfig
from permprune.engine.stages import expected, stages_of_pruning
from permprune.forecasts.forecast import Forecast
from permprune.system.progress import CALIBRATE, DENSE, PACK, READ, TRAIN, TRAIN_BLOCKS, UPDATE

ALL = {"order": "newton:start=ria:rounds=2", "update": "admm", "train": "steps=2:blocks=true"}
RECIPES = [*({"order": order} for order in ("none", "ria", "newton:start=none")), {"train": "steps=2"}, ALL]


def forecast(source: Path, **changes: Any) -> Forecast:
    return permprune.forecast(str(source), PruneConfig(length=16, samples=24, **changes))


@pytest.mark.parametrize("packed", ["bf16", "int4"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_stage_of_a_run_is_expected_and_all_of_the_time_is_theirs(
    tiny_checkpoint: Path, recipe: dict[str, str], packed: str
) -> None:
    found = forecast(tiny_checkpoint, **recipe, packed=packed)
    seconds, limited = expected(found)
    names = stages_of_pruning(found.config, packed=True, timed=True)
    assert not limited and seconds.keys() == set(names)
    assert sum(seconds[name] or 0.0 for name in names) == pytest.approx(sum(filter(None, found.seconds.values())))
    assert seconds[DENSE] and seconds[CALIBRATE] and seconds[READ]
    assert bool(seconds[PACK]) is (packed == "int4")


def test_each_change_of_weights_takes_its_own_time(tiny_checkpoint: Path) -> None:
    found = forecast(tiny_checkpoint, **ALL)
    seconds, _ = expected(found)
    for stage, phase in ((UPDATE, "update"), (TRAIN_BLOCKS, "blocks")):
        assert seconds[stage] == pytest.approx(found.seconds[phase])
    assert seconds[TRAIN] == pytest.approx((found.seconds["training"] or 0.0) + (found.seconds["accept"] or 0.0))
    rounds = sum(found.seconds[f"newton: {phase}"] or 0.0 for phase in ("gradients", "proposals", "accept"))
    assert seconds["newton, rounds"] == pytest.approx(rounds)
    assert seconds["newton, start"] == pytest.approx(found.seconds["ria"])


def test_a_limit_ends_the_stages_of_the_search_and_what_is_not_known_stays_so(tiny_checkpoint: Path) -> None:
    seconds, limited = expected(forecast(tiny_checkpoint, order="newton", minutes=3, update="sparsegpt"))
    assert limited == ("newton, start", "newton, rounds", UPDATE) and seconds[UPDATE] is None


def test_the_patterns_of_a_mix_have_a_stage(tiny_checkpoint: Path) -> None:
    found = forecast(tiny_checkpoint, order="ria", pattern="mixed", max_loss=0.01)
    seconds, _ = expected(found)
    assert seconds.keys() >= set(stages_of_pruning(found.config, packed=False, timed=False))
    assert found.seconds["other shares of the weights"]
