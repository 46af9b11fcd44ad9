"""The default loss: distances of hidden states against direct computation, and the choice of weights."""

import pytest
import torch

from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.losses.objective import TRAINED_HIDDEN_STATES, Objective, TeacherOutputs, block_outputs
from permprune.losses.targets import Imitation, choose_task, next_token
from permprune.models.forward import padding_of, run_model

from ..modalities import EXAMPLES, make


def hidden_states(model: torch.nn.Module, examples: Examples) -> list[torch.Tensor]:
    with torch.no_grad(), block_outputs(model, padding_of(model, examples)) as outputs:
        run_model(model, examples)
    return [output.double() for output in outputs]


@pytest.mark.parametrize("data", ["vit", "bert", "whisper"])
def test_hidden_states_are_compared_relative_to_their_length(data: str) -> None:
    examples, model, dense = EXAMPLES[data]()[:3], make(data), make(data)
    task = choose_task(dense, examples, 3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    objective = Objective(0.0, hidden_states=2.0)
    outputs = objective.compute_teacher_outputs(dense, examples, task)
    found, terms = objective(model, examples, task, outputs)
    ratios = [
        ((own - wanted).norm(dim=-1) / wanted.norm(dim=-1)).square().mean()
        for own, wanted in zip(hidden_states(model, examples), hidden_states(dense, examples), strict=True)
    ]
    assert found.item() == pytest.approx(2 * terms * float(torch.stack(ratios).mean()), rel=1e-4)
    assert objective(dense, examples, task, outputs)[0].item() == 0


def test_a_hidden_state_of_zeros_has_a_finite_distance() -> None:
    examples, model = EXAMPLES["vit"]()[:2], make("vit")
    states = [torch.zeros_like(state, dtype=torch.float32) for state in hidden_states(model, examples)]
    objective = Objective(0.0, hidden_states=1e-30)
    found, _ = objective(model, examples, choose_task(model, examples, 2), TeacherOutputs(None, states))
    assert found.isfinite()


@pytest.mark.parametrize("objective", [Objective(), Objective(divergence=1.0), Objective(0.0, cosine=1.0)], ids=repr)
def test_outputs_of_blocks_are_held_if_they_are_compared(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, collect = [], block_outputs
    monkeypatch.setattr("permprune.losses.objective.block_outputs", lambda *given: asked.append(1) or collect(*given))
    examples, model = EXAMPLES["vit"]()[:2], make("vit")
    task = choose_task(model, examples, 2)
    value, _ = objective(model, examples, task, objective.compute_teacher_outputs(model, examples, task))
    assert value.isfinite() and len(asked) == (2 if objective.cosine else 0)


def test_training_compares_hidden_states_where_few_positions_have_labels() -> None:
    text = Objective().for_training(next_token)
    assert text == Objective(divergence=1.0)
    assert not text.compares_blocks
    for task in (choose_task(make("whisper"), EXAMPLES["whisper"](), 4), Imitation()):
        trained = Objective(distillation=1e-5).for_training(task)
        assert trained == Objective(divergence=1.0, distillation=1e-5, hidden_states=TRAINED_HIDDEN_STATES)
        assert trained.compares_blocks and trained.needs_teacher(task)
        assert Objective(hidden_states=5.0).for_training(task).hidden_states == 5


def test_weights_that_are_all_zero_are_refused() -> None:
    assert Objective(0.0, hidden_states=1.0).compares_blocks
    with pytest.raises(PermpruneError, match="hidden_states or cosine"):
        Objective(0.0)
