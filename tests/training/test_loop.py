"""The loop: it learns, the same twice, goes on where it stopped, and leaves the best epoch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from permprune.errors import PermpruneError
from permprune.evaluation.dispatch import evaluate_model
from permprune.evaluation.result import TOP_1_ACCURACY, Result
from permprune.examples import Examples
from permprune.losses.objective import Objective
from permprune.losses.targets import labelled, scored
from permprune.system.search_state import Checkpoint
from permprune.training.loop import Trainer, Training
from permprune.training.weights import trained_weights

from ..modalities import draw, make, scorer

COUNT = 60


def numbered(scores: bool = False) -> Examples:
    """Sentences whose first token says what they are labelled."""
    ids = draw(64, COUNT, 9)
    mask = (torch.arange(9) < 3 + draw(7, COUNT, 1, seed=1)).long()
    labels = ids[:, 0] / 16 if scores else ids[:, 0] // 22
    return Examples({"input_ids": ids, "attention_mask": mask, "labels": labels})


def trainer(model: PreTrainedModel, training: Training, folder: Path | None = None, **changes: Any) -> Trainer:
    data = numbered(changes.get("task") is scored)
    settings: dict[str, Any] = {
        "task": labelled,
        "loss": Objective(),
        "measure": lambda: evaluate_model(model, data)[0],
        "checkpoint": Checkpoint(folder, {}),
    }
    return Trainer(model=model, weights=trained_weights(model, "all"), training=training, **{**settings, **changes})


@pytest.mark.slow
def test_classes_are_learned_the_same_twice() -> None:
    training = Training(epochs=6, rate=3e-3, batch=8)
    models = [make("bert") for _ in range(2)]
    before = torch.get_rng_state()
    curves = [trainer(model, training).fit(numbered()) for model in models]
    assert torch.equal(before, torch.get_rng_state())
    assert curves[0][-1].value > 0.9 > curves[0][0].value
    assert [(epoch.loss, epoch.value) for epoch in curves[0]] == [(epoch.loss, epoch.value) for epoch in curves[1]]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other) and one.requires_grad


def test_each_module_keeps_its_mode() -> None:
    model = make("bert").train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    trainer(model, Training(epochs=1, batch=8)).fit(numbered())
    assert [module.training for module in model.modules()] == modes and len({*modes}) == 2


@pytest.mark.slow
def test_scores_are_learned() -> None:
    curve = trainer(scorer(), Training(epochs=8, rate=3e-3, batch=8), task=scored).fit(numbered(scores=True))
    assert curve[-1].value > 0.8 > curve[0].value


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    training = Training(epochs=4, rate=3e-3, batch=8)
    whole, halved, again = (make("bert") for _ in range(3))
    trainer(whole, training).fit(numbered())
    stopping = trainer(halved, training, tmp_path)
    measured: list[Result] = []
    inner = stopping.measure

    def measure() -> Result:
        if len(measured) == 3:
            raise Stopped
        measured.append(inner())
        return measured[-1]

    stopping.measure = measure
    with pytest.raises(Stopped):
        stopping.fit(numbered())
    curve = trainer(again, training, tmp_path).fit(numbered())
    assert len(curve) == 5
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_best_epoch_is_left() -> None:
    model = make("bert")
    values = iter([0.5, 0.9, 0.7, 0.1])
    seen: list[torch.Tensor] = []

    def measure() -> Result:
        seen.append(model.classifier.weight.detach().clone())
        return Result("classification", TOP_1_ACCURACY, next(values), count=1)

    trainer(model, Training(epochs=3, rate=1e-2), measure=measure).fit(numbered())
    assert torch.equal(model.classifier.weight, seen[1]) and not torch.equal(seen[1], seen[3])


def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A teacher, and a student that is a little off."""
    teacher, student = make("bert"), make("bert")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return teacher, student


def test_a_student_comes_nearer_to_its_teacher() -> None:
    teacher, student = pair()
    data = numbered()
    distances = []

    def measure() -> Result:
        result = evaluate_model(student, data, dense=teacher)[1]
        distances.append(result.value)
        return result

    objective = Objective(task=0.0, divergence=1.0)
    trainer(student, Training(epochs=5, rate=1e-3), loss=objective, teacher=teacher, measure=measure).fit(data)
    assert min(distances) < 0.5 * distances[0]


def test_held_out_examples_say_which_epoch_is_the_best_whatever_is_measured() -> None:
    teacher, student = pair()
    values = iter([0.9, 0.7, 0.5, 0.3])
    own = {
        "loss": Objective(task=0.0, divergence=1.0),
        "teacher": teacher,
        "measure": lambda: Result("classification", TOP_1_ACCURACY, next(values), count=1),
        "held_out": numbered()[40:],
    }
    curve = trainer(student, Training(epochs=3, rate=1e-3), **own).fit(numbered()[:40])
    losses = [epoch.held_out or 0.0 for epoch in curve]
    assert 0 < min(losses) < 0.8 * losses[0]
    left = evaluate_model(student, numbered()[40:], dense=teacher)[1].value
    assert left == pytest.approx(min(losses), rel=0.05)


def test_no_dropout_stands_between_student_and_teacher() -> None:
    own = {"loss": Objective(task=0.0, divergence=1.0), "teacher": make("bert")}
    curve = trainer(make("bert"), Training(epochs=1, rate=1e-9), **own).fit(numbered())
    assert curve[1].loss is not None and curve[1].loss < 1e-5


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = make("bert")
    with torch.no_grad():
        model.classifier.bias.fill_(float("inf"))
    with pytest.raises(PermpruneError, match="smaller --lr"):
        trainer(model, Training(epochs=1)).fit(numbered())
