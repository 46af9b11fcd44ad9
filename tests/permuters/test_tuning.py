"""Training between the rounds and after them, against Adam written out."""

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import LlamaForCausalLM

from permprune.config import PruneConfig
from permprune.engine.held import Prepared, prepare
from permprune.errors import PermpruneError
from permprune.examples import IGNORED, Examples
from permprune.forecasts.costs import state_bytes
from permprune.kernels.adam.step import BETAS, RISING
from permprune.losses.objective import Loss, Objective, as_loss
from permprune.permuters.trust_region import Newton
from permprune.permuters.tuning import (
    LOGGED,
    SLOWER,
    Schedule,
    counted,
    first_ended,
    has_risen,
    timed,
    train_weights,
)
from permprune.system import progress, search_state
from permprune.system.search_state import Checkpoint, Resumable

WINDOWS = torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def prepared(tiny_llama: LlamaForCausalLM) -> Prepared:
    config = PruneConfig(mode="gather", precision="fp32", measured=6, held_out=4)
    return prepare(tiny_llama, None, config, examples=WINDOWS)


def train(
    prepared: Prepared,
    schedule: Schedule,
    *,
    first: int = 0,
    rate: float = 1e-3,
    saved: Resumable | None = None,
    loss: Loss | None = None,
) -> dict[str, torch.Tensor]:
    """The weights of a training whose steps take batches from number `first` on."""
    saved, train = saved or Resumable(Checkpoint(None, {}), "training"), prepared.run.train
    run = dataclasses.replace(prepared.run, train=train[(torch.arange(len(train)) + 4 * first) % len(train)])
    return train_weights(prepared.network, run, loss or Objective(), schedule, examples=4, rate=rate, saved=saved)


def test_every_step_takes_the_gradient_where_the_last_one_ended(prepared: Prepared) -> None:
    network, run, rate = prepared.network, prepared.run, 0.1
    expected = {name: weight.clone() for name, weight in network.dense.items()}
    scales = {name: float(weight[network.masks[name]].square().mean().sqrt()) for name, weight in expected.items()}
    first = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    by_row = {name: torch.zeros(len(weight), 1) for name, weight in expected.items()}
    by_channel = {name: torch.zeros(weight.shape[1]) for name, weight in expected.items()}
    places = [RISING / 2, RISING, (1 + RISING) / 2]
    for step, height in enumerate([rate / 2, rate, rate / 2]):
        network.set_weights({name: weight.clone() for name, weight in expected.items()})
        for name, gradient in network.gradients(run.batch(5 + step, 4), Objective()).weight.items():
            own, mask = gradient * network.masks[name], network.masks[name]
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * own
            kept = own.square().sum(1, keepdim=True) / mask.sum(1, keepdim=True), own.square().sum(0) / mask.sum(0)
            by_row[name] = BETAS[1] * by_row[name] + (1 - BETAS[1]) * kept[0]
            by_channel[name] = BETAS[1] * by_channel[name] + (1 - BETAS[1]) * kept[1].nan_to_num()
            mean, square = first[name] / (1 - BETAS[0] ** (step + 1)), by_row[name] * by_channel[name]
            square /= by_row[name].mean() * (1 - BETAS[1] ** (step + 1))
            expected[name] -= height * scales[name] * mean / (square.sqrt() + 1e-8)
    network.set_weights({})
    shown = dict(network.shown)
    found = train(prepared, lambda done, _: (*places, None)[done], first=5, rate=rate)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=5e-5, rtol=0)
        assert torch.equal(network.shown[name], shown[name])


@pytest.mark.parametrize(("steps", "repeats"), [(3, False), (4, True), (9, True)])
def test_a_second_pass_over_the_data_is_said_once(
    prepared: Prepared, steps: int, repeats: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(prepared.run.train) == 14
    train(prepared, counted(steps))
    assert sum("starts over after 14 windows" in line for line in caplog.messages) == repeats


def test_after_a_rise_of_the_loss_training_goes_back_with_a_lower_rate(
    prepared: Prepared, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, last, rate = 2 * LOGGED + 9, 2 * LOGGED - 1, 0.05
    places = [counted(steps)(step, 0.0) or 0.0 for step in range(steps)]
    assert not any("the loss rose" in line for line in caplog.messages)
    with monkeypatch.context() as patch:
        patch.setattr("permprune.permuters.tuning.RISEN", 0.9)  # it would have to fall by a tenth
        patch.setattr("permprune.permuters.tuning.ERRORS", -1e9)
        found = train(prepared, counted(steps), rate=rate)
    shares = [line.split(", with ")[1] for line in caplog.messages if "the loss rose" in line]
    assert shares == [f"{share:g} of the learning rate" for share in (SLOWER, SLOWER**2)]

    def rest(done: int, _: float) -> float | None:
        return (places[last + 1 + done] - places[last]) / (1 - places[last]) if done < 9 else None

    expected = train(prepared, rest, first=last + 1, rate=SLOWER**2 * rate)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-8)


def test_losses_of_few_tokens_that_differ_from_step_to_step_have_not_risen() -> None:
    assert not has_risen(0.2925, 0.5132, 0.25)  # of two short answers a step
    assert has_risen(4.8, 8.8, 1.3) and has_risen(-4.8, -2.0, 0.1)
    assert not has_risen(4.8, 5.9, 0.1)
    assert has_risen(4.8, math.nan, math.nan) and has_risen(math.nan, 4.8, 0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_after_losses_that_are_no_numbers_training_goes_back(
    prepared: Prepared, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    def loss(model: nn.Module, batch: Examples) -> torch.Tensor:
        mean: torch.Tensor = model(**batch, labels=batch["input_ids"]).loss
        return mean * value

    weights = train(prepared, counted(LOGGED), loss=as_loss(loss))
    assert any("the loss rose" in line for line in caplog.messages)
    assert all(torch.equal(weights[name], weight) for name, weight in prepared.network.dense.items())


def test_a_batch_without_labels_changes_nothing(tiny_llama: LlamaForCausalLM) -> None:
    answers = Examples({"input_ids": WINDOWS, "labels": WINDOWS.clone()})
    answers["labels"][::2] = IGNORED
    config = PruneConfig(mode="gather", precision="fp32", measured=6, held_out=4, batch=1)
    prepared = prepare(tiny_llama, None, config, examples=answers)
    assert all(weight.isfinite().all() for weight in train(prepared, counted(2)).values())
    none = prepared.run.train[prepared.run.train["labels"][:, 0] == IGNORED]
    gradients: list[torch.Tensor] = []
    loss = prepared.network.take_gradients(none, Objective(), lambda _, gradient: gradients.append(gradient))
    assert loss == 0 and len(gradients) == len(prepared.network.layers) and not any(map(torch.any, gradients))


def test_training_shows_its_progress_on_a_terminal(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, force_terminal=True, width=100))
    train(prepared, counted(2))
    assert "training: loss" in file.getvalue() and "75/100" in file.getvalue()


def test_the_steps_of_a_count_are_even() -> None:
    assert [counted(4)(done, 9.0) for done in range(5)] == [1 / 8, 3 / 8, 5 / 8, 7 / 8, None]


def test_the_steps_of_a_time_end_before_it_is_over() -> None:
    steps = [(0, 0.0), (1, 2.0), (2, 4.0), (3, 10.0)]  # a fourth step would end after 13.3
    assert [timed(13.0)(*step) for step in steps] == [0, (2 + 1) / 13, (4 + 1) / 13, None]
    assert timed(-1.0)(0, 0.0) is None


def test_the_first_end_of_two_schedules_is_approached() -> None:
    both = first_ended(counted(4), timed(13.0))
    steps = [(0, 0.0), (1, 1.0), (2, 4.0), (3, 10.0)]
    assert [both(*step) for step in steps] == [1 / 8, 3 / 8, 5 / 8, None] and both(4, 0.0) is None


def test_the_time_of_an_interrupted_training_counts(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_state, "EVERY", 0.0)
    told: list[tuple[int, float]] = []

    def schedule(done: int, spent: float) -> float | None:
        told.append((done, spent))
        if len(told) == 4:
            raise KeyboardInterrupt
        return 0.5 if done < 5 else None

    def saved() -> Resumable:
        return Resumable(Checkpoint(tmp_path, {}), "training", key=3)

    with pytest.raises(KeyboardInterrupt):
        train(prepared, schedule, saved=saved())
    spent = told[2][1]
    train(prepared, schedule, saved=saved())
    assert [done for done, _ in told] == [0, 1, 2, 3, 3, 4, 5] and 0 < spent < told[4][1] < told[5][1]
    size = (tmp_path / "training.safetensors").stat().st_size
    plain, tuning = (state_bytes(method, prepared.outline) for method in (Newton(), Newton(train_steps=1)))
    weights = sum(weight.nbytes for weight in prepared.network.dense.values())
    assert tuning - plain == pytest.approx(2 * size + 3 * weights, abs=2.5 * 10**4)  # of headers
    assert saved().before > spent and Resumable(Checkpoint(tmp_path, {}), "training", key=4).take() is None


def test_training_takes_what_the_rounds_leave_of_the_time(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits: list[float] = []
    place = "permprune.permuters.after_rounds.timed"
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
    assert [point.stage for point in short.curve] == ["search"] and len(limits) == 1
    assert "training: no time is left of --minutes 1e-09" in caplog.messages


def test_a_training_of_a_number_of_steps_keeps_a_time_limit(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    place = "permprune.permuters.after_rounds.timed"
    monkeypatch.setattr(place, lambda seconds: limits.append(seconds) or counted(2))
    steps, trained = [], prepared.network.take_gradients

    def counting(*given: Any, **named: Any) -> float:
        steps.append(1)
        return trained(*given, **named)

    monkeypatch.setattr(prepared.network, "take_gradients", counting)
    for minutes, made in ((None, 3), (2.0, 2)):
        steps.clear()
        method = Newton(rounds=1, train_steps=3)
        solution = method.solve(prepared.network, dataclasses.replace(prepared.run, minutes=minutes))
        assert len(steps) == made and [point.stage for point in solution.curve] == ["search", "search", "training"]
    assert 100 < limits[0] <= 120
    assert Newton(train_steps=3).search_share == Newton(block_steps=3).search_share == pytest.approx(0.3)
    assert Newton(train=0.9, train_steps=3).search_share == pytest.approx(0.1)
    PruneConfig(permute="newton:train=0.9:train_steps=3")  # without a limit only the steps count


@pytest.mark.parametrize("before", [{"refine": 1}, {"block_steps": 2}])
def test_a_training_after_other_stages_does_not_go_on_from_an_interrupted_one(
    prepared: Prepared, before: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_state, "EVERY", 0.0)
    method = Newton(rounds=1, examples=4, train_steps=4, rate=0.05)
    run = dataclasses.replace(prepared.run, checkpoint=Checkpoint(tmp_path, {}), held_out=prepared.run.train)

    def stop(steps: int) -> Schedule:
        def place(done: int, _: float) -> float:
            if done == 2:
                raise KeyboardInterrupt
            return 0.5

        return place

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("permprune.permuters.after_rounds.counted", stop)
        dataclasses.replace(method, **before).solve(prepared.network, run)
    other = dataclasses.replace(method, **({"compensate": True} if "refine" in before else {"block_steps": 4}))
    resumed = other.solve(prepared.network, run)
    whole = other.solve(prepared.network, dataclasses.replace(run, checkpoint=Checkpoint(None, {}), solved={}))
    assert all(torch.equal(weight, resumed.weights[name]) for name, weight in whole.weights.items())


def test_training_at_the_end_needs_a_time_limit(prepared: Prepared) -> None:
    message = r"newton:train=0\.5 trains for a share of a time limit: give --minutes"
    with pytest.raises(PermpruneError, match=message):
        PruneConfig(permute="newton:train=0.5")
    with pytest.raises(PermpruneError, match=message):
        Newton(train=0.5).solve(prepared.network, prepared.run)
