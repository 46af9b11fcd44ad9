"""Rounding explains how far a packed model's outputs are from those of the model with zeros, and no other error is."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from permprune.checkpoints.probe import Probe, make_probe, output_difference
from permprune.errors import PermpruneError
from permprune.inference.pack import pack
from permprune.inference.rounding import LEAST_OUTPUTS, check_rounding, rounding_change
from permprune.kernels.product.module import PackedLinear

from .test_pack import TOKENS, prune_to


def packed(model: PreTrainedModel, dtype: str, head: str | None = None) -> Probe:
    """Prune and pack a model; return the probe of the model with zeros."""
    patterns = prune_to(model)
    probe = make_probe(model, {"input_ids": TOKENS})
    pack(model, patterns, dtype=dtype, head=head)
    return probe


def checked(model: PreTrainedModel, probe: Probe) -> tuple[float, float]:
    """The difference of the outputs, and what rounding at random changes."""
    difference = output_difference(model, probe, "it")
    return difference, check_rounding(model, probe, difference, before=probe.tolerance, what="it")


@pytest.mark.parametrize(("dtype", "head"), [("bf16", None), ("int8", "int8"), ("int4", None)])
@pytest.mark.parametrize("tied", [False, True])
def test_noise_is_of_the_size_of_rounding_errors(dtype: str, head: str | None, tied: bool) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, tie_word_embeddings=tied, **sizes)).eval().requires_grad_(False)
    difference, rounding = checked(model, packed(model, dtype, head))
    assert rounding / 4 < difference < 4 * rounding


def test_noise_is_drawn_more_than_once_for_few_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw may happen not to move the two logits of a classifier, whose rounding error would then be refused."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=96, pad_token_id=0, num_labels=2, **sizes))
    model.eval().requires_grad_(False)
    probe = packed(model, "bf16")
    found = rounding_change(model, probe)
    monkeypatch.setattr("permprune.inference.rounding.DRAWS", 1)
    assert probe.outputs.numel() < LEAST_OUTPUTS and 0 < rounding_change(model, probe) < found


def test_another_error_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    probe = packed(tiny_llama, "int8")
    scales = [module.packed.scale for module in tiny_llama.modules() if isinstance(module, PackedLinear)]
    with torch.no_grad():
        for scale in scales:
            assert scale is not None
            scale.mul_(1.5)
    with pytest.raises(PermpruneError, match="other outputs"):
        checked(tiny_llama, probe)
