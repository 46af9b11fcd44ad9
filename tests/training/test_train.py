"""Training of the weights that are kept, against Adam written out."""

import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import LlamaForCausalLM

from permprune.config import PruneConfig
from permprune.engine.held import Prepared, prepare
from permprune.examples import IGNORED, Examples
from permprune.forecasts.costs import state_bytes
from permprune.kernels.adam.step import BETAS, RISING
from permprune.losses.objective import Loss, Objective, as_loss
from permprune.system import progress, search_state
from permprune.system.search_state import Checkpoint, Resumable
from permprune.training.kept_weights import LOGGED, SLOWER, has_risen
from permprune.training.train import Training, place, train_weights

WINDOWS = torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def prepared(tiny_llama: LlamaForCausalLM) -> Prepared:
    config = PruneConfig(mode="gather", precision="fp32", measured=6, held_out=4)
    return prepare(tiny_llama, None, config, examples=WINDOWS)


def train(
    prepared: Prepared,
    steps: int,
    *,
    first: int = 0,
    rate: float = 1e-3,
    saved: Resumable | None = None,
    loss: Loss | None = None,
) -> dict[str, torch.Tensor]:
    """The weights of a training whose steps take batches from number `first` on."""
    saved, train = saved or Resumable(Checkpoint(None, {}), "training"), prepared.run.train
    run = dataclasses.replace(prepared.run, train=train[(torch.arange(len(train)) + 2 * first) % len(train)])
    method = Training(steps=steps, rate=rate)
    return train_weights(prepared.network, run, method, loss or Objective(), saved=saved, limit=math.inf)


@pytest.fixture
def at_places(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Let trainings have steps at these places of the schedule."""
    return lambda places: monkeypatch.setattr(
        "permprune.training.train.place", lambda _, __, done, ___: (*places, None)[done]
    )


def test_every_step_takes_the_gradient_where_the_last_one_ended(
    prepared: Prepared, at_places: Callable[[list[float]], None]
) -> None:
    network, run, rate = prepared.network, prepared.run, 0.1
    expected = {name: weight.clone() for name, weight in network.dense.items()}
    scales = {name: float(weight[network.masks[name]].square().mean().sqrt()) for name, weight in expected.items()}
    first = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    by_row = {name: torch.zeros(len(weight), 1) for name, weight in expected.items()}
    by_channel = {name: torch.zeros(weight.shape[1]) for name, weight in expected.items()}
    places = [RISING / 2, RISING, (1 + RISING) / 2]
    for step, height in enumerate([rate / 2, rate, rate / 2]):
        network.set_weights({name: weight.clone() for name, weight in expected.items()})
        for name, gradient in network.gradients(run.batch(5 + step, 2), Objective()).weight.items():
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
    at_places(places)
    found = train(prepared, 3, first=5, rate=rate)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=5e-5, rtol=0)
        assert torch.equal(network.shown[name], shown[name])


@pytest.mark.parametrize(("steps", "repeats"), [(7, False), (8, True), (15, True)])
def test_a_second_pass_over_the_data_is_said_once(
    prepared: Prepared, steps: int, repeats: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(prepared.run.train) == 14
    train(prepared, steps)
    assert sum("starts over after 14 windows" in line for line in caplog.messages) == repeats


def test_after_a_rise_of_the_loss_training_goes_back_with_a_lower_rate(
    prepared: Prepared,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    at_places: Callable[[list[float]], None],
) -> None:
    steps, last, rate = 2 * LOGGED + 9, 2 * LOGGED - 1, 0.05
    places = [(step + 0.5) / steps for step in range(steps)]
    assert not any("the loss rose" in line for line in caplog.messages)
    with monkeypatch.context() as patch:
        patch.setattr("permprune.training.kept_weights.RISEN", 0.9)  # it would have to fall by a tenth
        patch.setattr("permprune.training.kept_weights.ERRORS", -1e9)
        found = train(prepared, steps, rate=rate)
    shares = [line.split(", with ")[1] for line in caplog.messages if "the loss rose" in line]
    assert shares == [f"{share:g} of the learning rate" for share in (SLOWER, SLOWER**2)]

    at_places([(place - places[last]) / (1 - places[last]) for place in places[last + 1 :]])
    expected = train(prepared, 9, first=last + 1, rate=SLOWER**2 * rate)
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

    weights = train(prepared, LOGGED, loss=as_loss(loss))
    assert any("the loss rose" in line for line in caplog.messages)
    assert all(torch.equal(weights[name], weight) for name, weight in prepared.network.dense.items())


def test_a_batch_without_labels_changes_nothing(tiny_llama: LlamaForCausalLM) -> None:
    answers = Examples({"input_ids": WINDOWS, "labels": WINDOWS.clone()})
    answers["labels"][::2] = IGNORED
    config = PruneConfig(mode="gather", precision="fp32", measured=6, held_out=4, batch=1)
    prepared = prepare(tiny_llama, None, config, examples=answers)
    assert all(weight.isfinite().all() for weight in train(prepared, 2).values())
    none = prepared.run.train[prepared.run.train["labels"][:, 0] == IGNORED]
    gradients: list[torch.Tensor] = []
    loss = prepared.network.take_gradients(none, Objective(), lambda _, gradient: gradients.append(gradient))
    assert loss == 0 and len(gradients) == len(prepared.network.layers) and not any(map(torch.any, gradients))


def test_training_shows_its_progress_on_a_terminal(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, force_terminal=True, width=100))
    train(prepared, 2)
    assert "training: loss" in file.getvalue() and "75/100" in file.getvalue()


def test_the_steps_of_a_count_are_even() -> None:
    assert [place(4, math.inf, done, 9.0) for done in range(5)] == [1 / 8, 3 / 8, 5 / 8, 7 / 8, None]


def test_steps_end_before_a_limit_is_over_and_the_nearer_end_is_approached() -> None:
    steps = [(0, 0.0), (1, 2.0), (2, 4.0), (3, 10.0)]  # a fourth step would end after 13.3
    assert [place(400, 13.0, *step) for step in steps] == [0.5 / 400, (2 + 1) / 13, (4 + 1) / 13, None]
    assert place(400, -1.0, 0, 0.0) is None
    steps = [(0, 0.0), (1, 1.0), (2, 4.0), (3, 10.0)]
    assert [place(4, 13.0, *step) for step in steps] == [1 / 8, 3 / 8, 5 / 8, None]


def test_the_time_of_an_interrupted_training_counts(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_state, "EVERY", 0.0)
    told: list[tuple[int, float]] = []

    def schedule(_: int, __: float, done: int, spent: float) -> float | None:
        told.append((done, spent))
        if len(told) == 4:
            raise KeyboardInterrupt
        return 0.5 if done < 5 else None

    monkeypatch.setattr("permprune.training.train.place", schedule)

    def saved() -> Resumable:
        return Resumable(Checkpoint(tmp_path, {}), "training", key=3)

    with pytest.raises(KeyboardInterrupt):
        train(prepared, 5, saved=saved())
    spent = told[2][1]
    train(prepared, 5, saved=saved())
    assert [done for done, _ in told] == [0, 1, 2, 3, 3, 4, 5] and 0 < spent < told[4][1] < told[5][1]
    size = (tmp_path / "training.safetensors").stat().st_size
    plain, tuning = (state_bytes(PruneConfig(train=train).recipe, prepared.outline) for train in ("none", "steps=1"))
    assert tuning - plain == pytest.approx(2 * size, abs=2.5 * 10**4)  # of headers
    assert saved().before > spent and Resumable(Checkpoint(tmp_path, {}), "training", key=4).take() is None
