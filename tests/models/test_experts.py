"""The matrices of experts as layers: what they compute, and what hooks on them see."""

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from permprune.models.experts import Experts, Routed, implementation, is_experts, run_in_turn
from permprune.models.forward import Padding
from permprune.models.hooks import hooked
from permprune.models.layers import Layer, block_linears, prunable_layers
from permprune.pattern import Pattern

from ..coupling.coupling_models import gpt_oss, mixtral, randomised
from ..experts import FAMILIES

TOKENS = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(0))


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def expert_layers(model: nn.Module) -> list[Layer]:
    return [layer for layer in block_linears(model) if layer.expert is not None]


def routes(module: nn.Module, call: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """The hidden states (tokens, channels) and the experts of each token (tokens, k) that a module reads in a call."""
    found: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[:2]))
    call()
    handle.remove()
    return found[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_turn_they_compute_what_other_implementations_compute(family: str) -> None:
    model = randomised(FAMILIES[family]())
    groups = [Experts(module) for module in experts_of(model).values()]
    with torch.no_grad():
        batched = model(input_ids=TOKENS).logits
        with implementation("eager", model.modules()):
            eager = model(input_ids=TOKENS).logits
        for whole in ((), [(group.module, index) for group in groups for index in range(len(group.matrices))]):
            with run_in_turn(groups, whole):
                torch.testing.assert_close(model(input_ids=TOKENS).logits, batched)
        torch.testing.assert_close(eager, batched)
        assert torch.equal(model(input_ids=TOKENS).logits, batched)  # as before, to the bit
    assert model.config._experts_implementation == "batched_mm"
    assert not any("permprune" in key for module in model.modules() for key in vars(module))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_matrix_is_a_layer(family: str) -> None:
    model = FAMILIES[family]()
    parameters = dict(model.named_parameters())
    layers = expert_layers(model)
    found = experts_of(model)
    assert len(layers) == sum(2 * len(module.down_proj) for module in found.values())
    assert len({layer.name for layer in layers}) == len(layers)
    for layer in layers:
        owner, number, attribute = layer.name.rsplit(".", 2)
        assert (layer.owner_name, int(number), layer.parameter) == (owner, layer.expert, f"{owner}.{attribute}")
        assert layer.owner is found[owner] and layer.stored is parameters[layer.parameter]
        matrix = layer.stored[int(number)]
        assert torch.equal(layer.weight, matrix.T if family == "gpt-oss" else matrix)
        assert layer.transposed == (family == "gpt-oss")
        layer.weight[0, 0] = 7.0
        assert (matrix == 7.0).sum() == 1  # it shares memory
    kept = prunable_layers(model, Pattern(2, 4), ["*.experts.1.*"])
    assert [layer.name for layer in kept] == [layer.name for layer in block_linears(model) if layer.expert != 1]


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_hooks_see_the_tokens_of_each_expert(family: str) -> None:
    model = randomised(FAMILIES[family]())
    (name, module), *_ = experts_of(model).items()
    hidden, index = routes(module, lambda: model(input_ids=TOKENS))
    seen: dict[str, tuple[Tensor, Routed, Tensor]] = {}

    def note(layer: Layer, x: Tensor, routed: Routed | None, output: Tensor) -> None:
        assert routed is not None
        seen[layer.name] = (x, routed, output)

    layers = [layer for layer in expert_layers(model) if layer.owner is module]
    with torch.no_grad(), hooked(layers, after=note):
        model(input_ids=TOKENS)
    for expert in range(3):
        places = (index == expert).any(1).nonzero().flatten()
        x, routed, inner = seen[f"{name}.{expert}.gate_up_proj"]
        assert torch.equal(routed.places, places) and routed.total == 18
        torch.testing.assert_close(x, hidden[places])
        biases = [getattr(module, f"{kind}_bias", torch.zeros(3, 1))[expert] for kind in ("gate_up_proj", "down_proj")]
        weights = {layer.name: layer.weight for layer in layers}
        torch.testing.assert_close(inner, x @ weights[f"{name}.{expert}.gate_up_proj"].T + biases[0])
        x, again, output = seen[f"{name}.{expert}.down_proj"]
        torch.testing.assert_close(x, module._apply_gate(inner))
        torch.testing.assert_close(output, x @ weights[f"{name}.{expert}.down_proj"].T + biases[1])
        assert again is routed
        mask = torch.arange(18).view(2, 9) % 4 > 0
        assert torch.equal(Padding.of(mask).real(x, routed), x[mask.flatten()[places]])


def test_an_expert_may_see_all_tokens_and_its_input_may_be_replaced() -> None:
    model = randomised(mixtral())
    layers = expert_layers(model)
    counts: dict[str, int] = {}

    def count(layer: Layer, x: Tensor, _: Routed | None) -> Tensor:
        counts[layer.name] = len(x)
        return torch.zeros_like(x)

    whole = {(layer.owner, 2) for layer in layers}
    with torch.no_grad(), hooked(layers, before=count, whole=whole):
        blank = model(input_ids=TOKENS).logits
    assert {counts[layer.name] == 18 for layer in layers if layer.expert == 2} == {True}
    assert min(counts.values()) < 18
    assert not torch.allclose(blank, model(input_ids=TOKENS).logits)


def test_gradients_reach_every_expert_in_turn() -> None:
    model = randomised(gpt_oss())

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with run_in_turn([Experts(module) for module in experts_of(model).values()]):
        found = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_nested_contexts_share_their_matrices() -> None:
    model = mixtral()
    layers = block_linears(model)
    calls: list[str] = []
    with hooked(layers, before=lambda layer, *_: calls.append("outer")):  # type: ignore[func-returns-value]
        with hooked(layers, before=lambda layer, *_: calls.append("inner")):  # type: ignore[func-returns-value]
            model(input_ids=TOKENS)
        assert calls.count("outer") == calls.count("inner") > 0
        model(input_ids=TOKENS)
        assert calls.count("outer") == 2 * calls.count("inner")
        with pytest.raises(AssertionError, match="unlike matrices"), hooked(block_linears(model)):
            pass
    calls.clear()
    model(input_ids=TOKENS)
    assert not calls


def test_other_modules_with_such_weights_are_no_experts() -> None:
    config = {"num_local_experts": 2, "hidden_size": 8, "intermediate_size": 8, "hidden_act": "silu"}
    other = tf.models.llama4.modeling_llama4.Llama4TextExperts(tf.Llama4TextConfig(**config))
    assert other.down_proj.dim() == 3 and not is_experts(other)
