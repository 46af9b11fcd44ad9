"""Heads of models that have none."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    WhisperModel,
)

from permprune.checkpoints.origin import Origin, linear_layers, origin_of, set_origin
from permprune.errors import PermpruneError
from permprune.training.heads import with_head

from ..modalities import bert_config, draw, make, whisper_config
from ..records import record_of


def test_a_text_model_gets_a_head_for_sentences(tmp_path: Path) -> None:
    model, ids = BertModel(bert_config()).eval(), draw(64, 9, 6)
    headed = with_head(model, ["no", "yes"])
    assert headed.config.id2label == {0: "no", 1: "yes"} and with_head(headed, ["no", "yes"]) is headed
    assert headed.bert.encoder.layer[0].output.dense.weight is model.encoder.layer[0].output.dense.weight
    headed.save_pretrained(tmp_path)
    again: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, headed(input_ids=ids).logits)


@pytest.mark.parametrize("kind", [CLIPVisionModel, CLIPVisionModelWithProjection])
def test_a_tower_of_clip_gets_a_head(kind: type[PreTrainedModel]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    tower = kind(CLIPVisionConfig(**sizes, image_size=16, patch_size=4))
    headed = with_head(tower, ["cat", "dog"])
    shared = {weight.data_ptr() for weight in tower.parameters()}
    own = {name for name, weight in headed.named_parameters() if weight.data_ptr() not in shared}
    assert own == {"classifier.weight", "classifier.bias"}


def test_a_record_names_the_layers_and_spaces_of_the_model_with_a_head() -> None:
    model = make("headless")
    name, *_ = linear_layers(model)
    mix = {"layers": {name: "dense"}, "keep": 1.0, "bytes": 9, "rounds": [], "curve": []}
    order = {"permutations": {"residual": [[1, 0]]}, "reordered": {"last_hidden_state": ["residual"]}}
    set_origin(model, Origin("model", torch.float32, record_of(mix=mix, **order)))
    headed = with_head(model, ["cat", "dog"])
    record = origin_of(headed).record
    assert record and record.mix and record.mix.layers.keys() < linear_layers(headed).keys()
    assert record.reordered == {"last_hidden_state": [*record.permutations]}


def test_a_model_without_a_kind_of_head_is_refused() -> None:
    with pytest.raises(PermpruneError, match="give a model with a head"):
        with_head(WhisperModel(whisper_config()).eval(), ["no", "yes"])
