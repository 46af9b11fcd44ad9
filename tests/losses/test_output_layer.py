"""Logits that are computed with the loss, from the inputs of the output layer."""

import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, LlamaConfig, PhiConfig, PreTrainedConfig

from permprune.examples import Examples
from permprune.losses import cross_entropy as module
from permprune.losses.cross_entropy import Projected, cross_entropy, distilled_cross_entropy, divergence, project
from permprune.losses.objective import Objective
from permprune.losses.targets import next_token
from permprune.models.narrow_weights import NarrowWeights

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}

PLAIN = {
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "bias": PhiConfig(**SIZES),
}
OTHER = {"scaled": CohereConfig(**SIZES), "soft cap": Gemma2Config(**SIZES, head_dim=8)}


def build(config: PreTrainedConfig, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def examples() -> Examples:
    return Examples({"input_ids": torch.randint(1, 97, (3, 9), generator=torch.Generator().manual_seed(1))})


def trained(model: nn.Module) -> nn.Parameter:
    return next(p for name, p in model.named_parameters() if name.endswith("q_proj.weight")).requires_grad_(True)


def plain_logits(model: nn.Module) -> Tensor:
    logits: Tensor = model(**examples(), use_cache=False).logits
    return logits[:, :-1].flatten(0, 1)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("at_once", [1, 5, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_the_logits(
    monkeypatch: pytest.MonkeyPatch, name: str, at_once: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(module, "PROJECTED", at_once)
    model, teacher = build(PLAIN[name]), build(PLAIN[name], 1)
    weight, labels = trained(model), examples()["input_ids"][:, 1:].flatten()
    close = {} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            target = plain_logits(teacher)
            dense = next_token(teacher, examples()).lazy_target()
        assert isinstance(dense, Projected) and not dense.hidden.requires_grad
        torch.testing.assert_close(dense.whole(), target, **close)
        logits, found = plain_logits(model), next_token(model, examples())
        assert isinstance(found.given, Projected) and found.terms == len(logits) == 24
        torch.testing.assert_close(found.logits, logits, **close)
        pairs = [
            (cross_entropy(logits, labels), found.loss()),
            (divergence(logits, target), found.distance(dense)),
            (
                distilled_cross_entropy(logits, labels, target, label_weight=0.3, divergence_weight=2.0),
                found.weighted_loss(dense, task=0.3, divergence=2.0),
            ),
            (divergence(logits, target), divergence(logits, dense)),
            (divergence(logits, target), divergence(next_token(model, examples()).given, target)),
        ]
    for wanted, own in pairs:
        torch.testing.assert_close(own, wanted, **close)
        gradients = [torch.autograd.grad(0.7 * loss, weight, retain_graph=True)[0] for loss in (wanted, own)]
        scale = gradients[0].abs().max()
        torch.testing.assert_close(gradients[1] / scale, gradients[0] / scale, **close)


@pytest.mark.parametrize("name", OTHER)
def test_logits_that_are_no_products_are_computed_by_the_model(name: str) -> None:
    model, runs = build(OTHER[name]), []
    model.register_forward_hook(lambda *_: runs.append(1))
    for expected in (2, 3):  # the first time it runs in vain
        found = next_token(model, examples())
        assert isinstance(found.given, Tensor) and len(runs) == expected
    torch.testing.assert_close(found.logits, plain_logits(model))


def widen(head: nn.Linear) -> None:
    head.register_forward_hook(lambda _module, _args, output: 2 * output)


def train(head: nn.Linear) -> None:
    head.weight.requires_grad_(True)


def wrap(head: nn.Linear) -> None:
    plain = head.forward
    head.forward = lambda hidden: 3 * plain(hidden)  # type: ignore[assignment,method-assign]


def hide(head: nn.Linear) -> None:
    def change(_module: nn.Module, _args: object, output: Tensor) -> None:
        output[..., :2] = -1e4

    head.register_forward_hook(change)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", [widen, train, wrap, hide])
def test_output_layers_that_do_more_run_as_they_are(change: Callable[[nn.Linear], None], inference: bool) -> None:
    model = build(PLAIN["untied"])
    change(model.lm_head)  # type: ignore[arg-type]
    with torch.inference_mode(inference):
        assert project(model, examples()) is None
    torch.testing.assert_close(next_token(model, examples()).logits, plain_logits(model))


def test_the_output_layer_runs_again_afterwards() -> None:
    model = build(PLAIN["untied"])
    before = plain_logits(model)
    assert project(model, examples()) is not None and "forward" not in vars(model.lm_head)
    torch.testing.assert_close(plain_logits(model), before)


def test_positions_without_a_label_are_left_out() -> None:
    model, ids = build(PLAIN["tied"]), examples()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    found = next_token(model, Examples({"input_ids": ids, "attention_mask": mask}))
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1][mask[:, 1:].bool()]
    assert isinstance(found.given, Projected) and found.terms == len(logits) == 21
    torch.testing.assert_close(found.loss(), F.cross_entropy(logits, ids[:, 1:][mask[:, 1:].bool()], reduction="sum"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_held_in_16_bits_are_used_in_the_type_of_activations(dtype: torch.dtype) -> None:
    model = build(PLAIN["tied"]).bfloat16().float()
    held = NarrowWeights.of(model, [], torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        given, logits = next_token(model, examples()).given, plain_logits(model)
    assert isinstance(given, Projected) and given.weight.dtype == torch.bfloat16 and given.hidden.dtype == dtype
    torch.testing.assert_close(given.whole(), logits)
    held.release()


def test_the_teacher_keeps_no_logits() -> None:
    model = build(PLAIN["untied"])
    loss = Objective(divergence=1.0)
    dense = loss.compute_teacher_outputs(model, examples(), next_token).predictions
    assert isinstance(dense, Projected) and dense.hidden.shape == (24, 32) and dense.weight is model.lm_head.weight
    value, terms = loss(model, examples(), next_token, loss.compute_teacher_outputs(model, examples(), next_token))
    torch.testing.assert_close(value, next_token(model, examples()).loss())
    assert terms == 24


def test_a_model_is_freed_though_it_is_known(name: str = "scaled") -> None:
    model = build(OTHER[name])
    assert project(model, examples()) is None
    gone = weakref.ref(model)
    del model
    assert gone() is None
