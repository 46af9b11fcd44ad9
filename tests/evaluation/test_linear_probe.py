"""The linear probe: its regression, and the classifier it leaves in a model."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    WhisperModel,
)

from permprune.checkpoints.origin import Origin, linear_layers, origin_of, set_origin
from permprune.engine.held import prune
from permprune.errors import PermpruneError
from permprune.evaluation.linear_probe import fit_probe, logistic_regression, with_head
from permprune.evaluation.metrics import accuracy
from permprune.examples import Examples

from ..modalities import bert_config, draw, make, whisper_config
from ..records import record_of

COUNT = 90


def coloured(labels: torch.Tensor) -> Examples:
    """Images of noise whose mean says their class."""
    noise = torch.randn(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(2))
    shift = torch.eye(3)[labels % 3][..., None, None]
    return Examples({"pixel_values": noise + 3 * shift, "labels": labels})


@pytest.mark.parametrize("classes", [2, 3])
def test_the_regression_is_at_the_minimum(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64) * torch.tensor([1, 10, 0.1, 1, 0]) + 3
    y = draw(classes, 60)
    weight, bias = (found.requires_grad_() for found in logistic_regression(x, y, classes, 0.05))
    loss = F.cross_entropy(x @ weight.T + bias, y) + 0.025 * (weight * x.std(0, correction=0)).square().sum()
    slopes = torch.autograd.grad(loss, (weight, bias))
    assert float(slopes[1].abs().max()) < 1e-5 and float((slopes[0][:, :4]).abs().max()) < 1e-4
    assert not weight[:, 4].any()  # the constant feature


def test_a_class_without_examples_is_never_predicted() -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight, bias = logistic_regression(x, 2 * draw(2, 40), 4, 0.1)
    assert set((x @ weight.T + bias).argmax(1).tolist()) <= {0, 2}
    weight, bias = logistic_regression(x, torch.full((40,), 1), 3, 0.1)
    assert (x @ weight.T + bias).argmax(1).eq(1).all()


def test_classes_without_examples_keep_their_names() -> None:
    model = fit_probe(with_head(make("headless"), ["cat", "dog", "owl"]), coloured(draw(2, COUNT)), classes=3).model
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    with torch.no_grad():
        assert model(pixel_values=coloured(draw(3, COUNT))["pixel_values"]).logits.argmax(1).max() == 1


@pytest.mark.parametrize("name", ["vit", "headless"])
def test_an_image_model_learns_a_head_that_saves_and_loads(name: str, tmp_path: Path) -> None:
    examples = coloured(draw(3, COUNT))
    probe = fit_probe(make(name), examples)
    assert probe.result.value > 0.8 and probe.result.count == 18
    trained = accuracy(probe.model, examples)
    assert trained.value > 0.9
    probe.model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert again.config.num_labels == 3
    assert accuracy(again, examples) == trained
    other = fit_probe(make(name), examples)
    assert torch.equal(other.model.classifier.weight, probe.model.classifier.weight)


def test_a_headless_text_model_gets_one_for_sentences(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(bert_config()).eval()
    ids, labels = draw(64, COUNT, 6), draw(2, COUNT, seed=3)
    ids[:, 0] = 10 + labels
    probe = fit_probe(model, Examples({"input_ids": ids, "labels": labels}))
    assert probe.result.value > 0.8
    assert probe.model.bert.encoder.layer[0].output.dense.weight is model.encoder.layer[0].output.dense.weight
    probe.model.save_pretrained(tmp_path)
    again: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, probe.model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", [CLIPVisionModel, CLIPVisionModelWithProjection])
def test_a_tower_of_clip_gets_a_head(kind: type[PreTrainedModel]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    tower = kind(CLIPVisionConfig(**sizes, image_size=16, patch_size=4))
    headed = with_head(tower, ["cat", "dog"])
    shared = {weight.data_ptr() for weight in tower.parameters()}
    own = {name for name, weight in headed.named_parameters() if weight.data_ptr() not in shared}
    assert own == {"classifier.weight", "classifier.bias"}


def test_a_probed_model_is_pruned_on_its_labels() -> None:
    examples = coloured(draw(3, COUNT))
    model = fit_probe(make("headless"), examples).model
    pruned = prune(model, permute="reconstruction", examples=examples, precision="fp32").model
    assert 1 / 3 < accuracy(pruned, examples).value <= 1


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


@pytest.mark.parametrize("labels", [None, torch.zeros(6, 2, dtype=torch.long), torch.zeros(6), torch.full((6,), -1)])
def test_other_labels_are_refused(labels: torch.Tensor | None) -> None:
    pixels = {"pixel_values": torch.zeros(6, 3, 8, 8)}
    examples = Examples(pixels if labels is None else {**pixels, "labels": labels})
    with pytest.raises(PermpruneError, match="one class number, 0 or higher"):
        fit_probe(make("vit"), examples)


def test_a_model_without_a_kind_of_head_is_refused() -> None:
    inputs = {"input_features": torch.zeros(6, 8, 20), "decoder_input_ids": draw(64, 6, 3), "labels": draw(2, 6)}
    with pytest.raises(PermpruneError, match="give a model with a head"):
        fit_probe(WhisperModel(whisper_config()).eval(), Examples(inputs))
