"""Which weights train, and that zeros stay."""

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, Wav2Vec2ForCTC

from permprune.errors import PermpruneError
from permprune.training.weights import trained_weights

from ..modalities import make


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


def test_a_model_without_an_embedding_table(tiny_ctc: Path) -> None:
    head = trained_weights(Wav2Vec2ForCTC.from_pretrained(tiny_ctc), "head")
    assert "lm_head.weight" in head
