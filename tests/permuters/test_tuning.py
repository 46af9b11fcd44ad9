"""Training between the rounds and after them, against Adam written out."""

import dataclasses
import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM

from permprune.config import PruneConfig
from permprune.errors import PermpruneError
from permprune.losses.objective import Objective
from permprune.permuters import tuning
from permprune.permuters.newton import Newton
from permprune.permuters.tuning import BETAS, RISING, counted, timed, train_weights
from permprune.pipeline import Prepared, prepare
from permprune.system import progress

WINDOWS = torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def prepared(tiny_llama: LlamaForCausalLM) -> Prepared:
    config = PruneConfig(mode="gather", precision="fp32", measured=6, held_out=4)
    return prepare(tiny_llama, None, config, examples=WINDOWS)


def test_every_step_takes_the_gradient_where_the_last_one_ended(prepared: Prepared) -> None:
    network, run, rate = prepared.network, prepared.run, 0.1
    expected = {name: weight.clone() for name, weight in network.dense.items()}
    scales = {name: float(weight[network.masks[name]].square().mean().sqrt()) for name, weight in expected.items()}
    first = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    second = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    places = [RISING / 2, RISING, (1 + RISING) / 2]
    for step, height in enumerate([rate / 2, rate, rate / 2]):
        network.set_weights({name: weight.clone() for name, weight in expected.items()})
        for name, gradient in network.gradients(run.batch(5 + step, 4), Objective()).weight.items():
            own = gradient * network.masks[name]
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * own
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * own**2
            mean, square = first[name] / (1 - BETAS[0] ** (step + 1)), second[name] / (1 - BETAS[1] ** (step + 1))
            expected[name] -= height * scales[name] * mean / (square.sqrt() + 1e-8)
    network.set_weights({})
    shown = dict(network.shown)
    found = train_weights(network, run, Objective(), places, first=5, examples=4, rate=rate)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=5e-5, rtol=0)
        assert torch.equal(network.shown[name], shown[name])


@pytest.mark.parametrize(("steps", "repeats"), [(3, False), (4, True), (9, True)])
def test_a_second_pass_over_the_data_is_said_once(
    prepared: Prepared, steps: int, repeats: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(prepared.run.train) == 14
    train_weights(prepared.network, prepared.run, Objective(), counted(steps), first=0, examples=4, rate=1e-3)
    assert sum("starts over after 14 windows" in line for line in caplog.messages) == repeats


def test_training_shows_its_progress_on_a_terminal(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, force_terminal=True, width=100))
    train_weights(prepared.network, prepared.run, Objective(), counted(2), first=0, examples=4, rate=1e-3)
    assert "training: loss" in file.getvalue() and "75/100" in file.getvalue()


def test_the_steps_of_a_count_are_even() -> None:
    assert list(counted(4)) == [1 / 8, 3 / 8, 5 / 8, 7 / 8]


def test_the_steps_of_a_time_end_before_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 102.0, 104.0, 110.0, 110.0])  # steps end after 2, 4 and 10 seconds
    monkeypatch.setattr(tuning, "time", SimpleNamespace(monotonic=lambda: next(now)))
    assert list(timed(13.0)) == [0, (2 + 1) / 13, (4 + 1) / 13]  # a fourth step would end after 13.3
    assert list(timed(-1.0)) == []


def test_training_takes_what_the_rounds_leave_of_the_time(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    place = "permprune.permuters.trust_region_search.timed"
    monkeypatch.setattr(place, lambda seconds: limits.append(seconds) or counted(3))
    method = Newton(rounds=2, examples=8, train=0.5, rate=0.05)
    run = dataclasses.replace(prepared.run, held_out=prepared.run.train)  # so that what is learned is measured
    solution = method.solve(prepared.network, dataclasses.replace(run, minutes=2.0))
    assert [point.stage for point in solution.curve] == ["search"] * 3 + ["training"]
    *_, searched, trained = solution.curve
    assert searched.seconds == pytest.approx(120 - limits[0]) and searched.seconds < trained.seconds
    assert trained.kept and trained.loss < searched.loss
    assert prepared.network.loss(run.held_out, Objective()) == pytest.approx(trained.loss, abs=1e-5)
    assert any(not torch.equal(weight, prepared.network.dense[name]) for name, weight in solution.weights.items())
    short = method.solve(prepared.network, dataclasses.replace(run, minutes=1e-9))
    assert [point.stage for point in short.curve] == ["search", "training"] and limits[1] < 0


def test_training_at_the_end_needs_a_time_limit(prepared: Prepared) -> None:
    message = r"newton:train=0\.5 trains for a share of a time limit: give --minutes"
    with pytest.raises(PermpruneError, match=message):
        PruneConfig(permute="newton:train=0.5")
    with pytest.raises(PermpruneError, match=message):
        Newton(train=0.5).solve(prepared.network, prepared.run)
