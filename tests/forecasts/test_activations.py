"""Activations counted on fake tensors: as many bytes as real tensors take."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from permprune.forecasts.activations import Gradients, _drop_gradient, _Live, count_activations
from permprune.losses.cross_entropy import cross_entropy
from permprune.models.activation_checkpointing import recomputed
from permprune.models.experts import IN_TURN, implementation
from permprune.models.layers import block_linears
from permprune.models.shallow import repetitions

from ..coupling.coupling_models import EXPERTS


def loss(model: nn.Module) -> Tensor:
    ids = torch.zeros(2, 24, dtype=torch.int64)
    return cross_entropy(model(input_ids=ids, use_cache=False).logits.flatten(0, 1), ids.flatten())


@pytest.fixture(scope="module")
def deep() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**EXPERTS, "num_hidden_layers": 6})).eval()


def real_peak(model: PreTrainedModel, gradients: Gradients, recompute: bool) -> int:
    """The bytes of the tensors that a pass on real tensors makes, at the peak."""
    model = copy.deepcopy(model).requires_grad_(False)
    layers = block_linears(model)
    if gradients == "weights":
        for layer in layers:
            layer.stored.requires_grad_(True).register_post_accumulate_grad_hook(_drop_gradient)
    live = _Live(model)
    with (
        live,
        torch.set_grad_enabled(gradients != "none"),
        recomputed(model, recompute),
        live.watching({layer.owner for layer in layers}, gradients == "inputs"),
    ):
        found = loss(model)
        if gradients != "none":
            found.backward()
    live.leave_head()
    return live.peak


@pytest.mark.parametrize(
    ("gradients", "recompute"), [("none", False), ("inputs", False), ("weights", False), ("weights", True)]
)
def test_fake_tensors_count_as_real_ones(deep: PreTrainedModel, gradients: Gradients, recompute: bool) -> None:
    meta = copy.deepcopy(deep).to("meta")
    settings = {"gradients": gradients, "dtype": torch.float32, "recompute": recompute}
    found = count_activations(meta, loss, **settings)
    peak = found.blocks + found.logits
    assert peak == pytest.approx(real_peak(deep, gradients, recompute), rel=0.005)
    assert found.positions == 48 and found.outputs == 6 * 48 * 32 * 4
    shorter = count_activations(meta, loss, **settings, lists=repetitions(meta))
    assert (shorter.blocks + shorter.logits, shorter.outputs) == (pytest.approx(peak, rel=0.01), found.outputs)


def test_less_is_kept_with_recomputation_and_without_gradients(deep: PreTrainedModel) -> None:
    meta = copy.deepcopy(deep).to("meta")
    peaks = [
        count_activations(meta, loss, gradients=gradients, dtype=torch.float32, recompute=recompute).blocks
        for gradients, recompute in (("weights", False), ("inputs", False), ("weights", True), ("none", False))
    ]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 2 * peaks[2]


@pytest.mark.parametrize("gradients", ["inputs", "weights"])
def test_experts_take_as_much_as_with_tokens_of_their_own(gradients: Gradients) -> None:
    model = MixtralForCausalLM(MixtralConfig(**{**EXPERTS, "num_local_experts": 4})).eval()
    with implementation(IN_TURN, model.modules()):
        peak = real_peak(model, gradients, recompute=False)
    found = count_activations(copy.deepcopy(model).to("meta"), loss, gradients=gradients, dtype=torch.float32)
    assert found.blocks + found.logits == pytest.approx(peak, rel=0.05)
