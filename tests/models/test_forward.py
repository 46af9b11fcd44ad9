"""Running a model leaves it as it was."""

from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import permprune
from permprune.coupling.discovery import discover
from permprune.examples import Examples
from permprune.models.forward import evaluating, frozen, inference, short_inputs, typed_inputs


@pytest.mark.parametrize("context", [evaluating, frozen, inference])
def test_each_module_gets_its_mode_back(context: object) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    model[0].eval()
    model[0].bias.requires_grad_(False)
    for failing in (False, True):
        try:
            with context(model):  # type: ignore[operator]
                assert not any(module.training for module in model.modules())
                if failing:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        assert [module.training for module in model.modules()] == [True, False, True]
        assert [parameter.requires_grad for parameter in model.parameters()] == [True, False]


def test_pruning_leaves_the_mode_of_each_module(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()
    before = [module.training for module in tiny_llama.modules()]
    examples = torch.randint(128, (12, 8), generator=torch.Generator().manual_seed(1))
    permprune.prune(tiny_llama, examples=examples, order="newton:rounds=1:examples=2", measured=4, held_out=2)
    assert [module.training for module in tiny_llama.modules()] == before


def test_a_run_that_is_interrupted_leaves_the_dense_model(tiny_llama: LlamaForCausalLM) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    examples = torch.randint(128, (12, 8), generator=torch.Generator().manual_seed(1))
    dense = tiny_llama(examples).logits
    settings: dict[str, Any] = {"order": "newton:rounds=1:examples=2", "measured": 4, "held_out": 2}
    with pytest.raises(KeyboardInterrupt) as caught:
        permprune.prune(tiny_llama, examples=examples, callbacks=[interrupt], **settings)
    assert torch.equal(tiny_llama(examples).logits, dense), caught  # while the traceback keeps what the run made


@pytest.mark.parametrize("kept", ["up_proj", "mlp.up_proj.weight", "layers.*.up_proj"])
def test_images_have_the_type_of_weights_that_are_not_kept_in_fp32(tiny_llama: LlamaForCausalLM, kept: str) -> None:
    model = tiny_llama.bfloat16()
    model.model.layers[0].mlp.up_proj.float()
    for expected in (torch.float32, torch.bfloat16):
        assert typed_inputs(model, {"pixel_values": torch.ones(1)})["pixel_values"].dtype == expected
        model._keep_in_fp32_modules_strict = {kept}


def test_the_short_inputs_of_padded_text_are_as_short(tiny_llama: LlamaForCausalLM) -> None:
    ids = torch.randint(128, (3, 40), generator=torch.Generator().manual_seed(1))
    padded = Examples({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    for examples in (padded, Examples.of(ids)):
        inputs = short_inputs(tiny_llama, examples)
        assert inputs.keys() == {"input_ids"} and torch.equal(inputs["input_ids"], ids[:2, :16])


class HubNorm(nn.Module):
    """A kernel for RMS norms, as the Hub has them; it can be run and not traced."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.from_numpy(LlamaRMSNorm.forward(self, hidden_states).numpy())  # type: ignore[arg-type]


class HubNorms:
    """What stands for a repository of the Hub."""

    def load(self) -> type[nn.Module]:
        return HubNorm


@pytest.mark.skipif(not hasattr(PreTrainedModel, "kernels_mode"), reason="uses kernels on request only")
def test_kernels_of_the_hub_are_used_again_after_tracing(tiny_llama: LlamaForCausalLM) -> None:
    from kernels import Mode, use_kernel_mapping

    example = {"input_ids": torch.randint(128, (2, 8), generator=torch.Generator().manual_seed(1))}
    expected = [space.name for space in discover(tiny_llama, example).spaces]
    with use_kernel_mapping({"RMSNorm": {"cpu": HubNorms()}}, inherit_mapping=False):
        tiny_llama.set_use_kernels(True)
        norms = [module for module in tiny_llama.modules() if isinstance(module, LlamaRMSNorm)]
        assert norms and all(norm.forward.__func__ is HubNorm.forward for norm in norms)
        assert [space.name for space in discover(tiny_llama, example).spaces] == expected
        assert all(norm.forward.__func__ is HubNorm.forward for norm in norms)
        assert tiny_llama.kernels_mode == Mode.INFERENCE


def test_evaluating_does_not_exchange_kernels(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "train", lambda *_: pytest.fail("kernels may be exchanged"))
    tiny_llama.training = tiny_llama.lm_head.training = True
    with evaluating(tiny_llama):
        assert not tiny_llama.lm_head.training
    assert tiny_llama.lm_head.training
