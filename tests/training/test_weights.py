"""Which weights train, and that zeros stay."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, Wav2Vec2ForCTC

from permprune.errors import PermpruneError
from permprune.training.weights import masked, trained_weights

from ..modalities import make, sentences


def test_kinds_of_weights(tiny_llama: LlamaForCausalLM) -> None:
    model = make("bert")
    everything = trained_weights(model, "all")
    assert everything.keys() == dict(model.named_parameters()).keys()
    head = trained_weights(model, "head")
    assert {name.removesuffix(".weight").removesuffix(".bias") for name in head} == {"bert.pooler.dense", "classifier"}
    norms = trained_weights(model, "norms")
    flat = {name for name, weight in everything.items() if weight.dim() == 1}
    assert norms.keys() == flat | head.keys()
    assert all("norm" in name for name in trained_weights(tiny_llama, "norms"))
    with pytest.raises(PermpruneError, match="no head"):
        trained_weights(tiny_llama, "head")
    with pytest.raises(PermpruneError, match="choose all, norms, head"):
        trained_weights(model, "some")


def test_a_model_without_an_embedding_table(tiny_ctc: Path) -> None:
    head = trained_weights(Wav2Vec2ForCTC.from_pretrained(tiny_ctc), "head")
    assert "lm_head.weight" in head


def test_zeros_stay_zero_and_the_rest_moves() -> None:
    model, data = make("bert"), sentences()
    layer = model.bert.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    before = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with masked(model, ["bert.encoder.layer.0.intermediate.dense"]):
        for _ in range(3):
            optimizer.zero_grad()
            model(**data).loss.backward()
            optimizer.step()
    assert torch.equal(layer.weight == 0, before == 0)
    assert (layer.weight != before)[:, 1::2].all()
    model(**data).loss.backward()
    assert layer.weight.grad[:, ::2].any()  # outside all have gradients again
