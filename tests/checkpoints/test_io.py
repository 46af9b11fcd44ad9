"""Checkpoints of any kind: read, written, and read again."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers as tf

from permprune.checkpoints.gathers import Gather, attach_gathers
from permprune.checkpoints.io import load, read_model, write_weights
from permprune.checkpoints.offload import attach, read_offloaded, read_skeleton, write_offloaded
from permprune.checkpoints.origin import Origin, linear_layers, set_origin
from permprune.checkpoints.probe import make_probe
from permprune.checkpoints.weights import GATHERED
from permprune.errors import PermpruneError
from permprune.models.dummy_inputs import example_inputs
from permprune.models.processors import feature_extractor_of, image_processor_of, read_processor, tokenizer_of
from permprune.pruning.folder import save

from ..records import record_of

KINDS = {
    "tiny_checkpoint": (tf.LlamaForCausalLM, tf.PreTrainedTokenizerBase),
    "tiny_bert": (tf.BertForSequenceClassification, tf.PreTrainedTokenizerBase),
    "tiny_vit": (tf.ViTForImageClassification, tf.BaseImageProcessor),
    "tiny_ctc": (tf.Wav2Vec2ForCTC, tf.Wav2Vec2Processor),
    "tiny_whisper": (tf.WhisperForConditionalGeneration, tf.WhisperProcessor),
}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@torch.no_grad()
def logits(model: tf.PreTrainedModel) -> torch.Tensor:
    example = example_inputs(model)
    found: torch.Tensor = model(**example).logits
    return found


@torch.no_grad()
def gather(model: tf.PreTrainedModel, dtype: torch.dtype) -> None:
    """Let a linear layer read its channels in reverse."""
    name, layer = [(name, layer) for name, layer in linear_layers(model).items() if ".0." in name][-1]
    order = torch.arange(layer.weight.shape[1]).flip(0)
    layer.weight.copy_(layer.weight[:, order])
    gathers = [Gather("tensor", "", [name], order.tolist())]
    attach_gathers(model, gathers)
    record = record_of(gathers=[dataclasses.asdict(gathers[0])])
    set_origin(model, Origin("model", dtype, record, make_probe(model, example_inputs(model))))


@pytest.mark.parametrize("gathered", [False, True])
def test_a_checkpoint_is_written_as_it_was_read(
    folder: Path, gathered: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, processor, stored = read_model(str(folder))
    kind, processing = KINDS[request.node.callspec.params["folder"]]
    assert type(model) is kind and isinstance(processor, processing) and stored == torch.float32
    out, before = tmp_path / "out", logits(model)
    if gathered:
        gather(model, stored)
        save(model, out, processor)
        assert torch.equal(logits(load(out)), logits(model))
    else:
        out.mkdir()
        write_weights(model, processor, stored, out)
    assert (out / GATHERED).exists() == gathered
    again, same, _ = read_model(str(out))
    assert type(again) is kind and type(same) is type(processor)
    assert torch.equal(logits(again), logits(model)) and torch.allclose(logits(again), before, atol=1e-5)


def test_weights_on_disk_are_those_of_the_same_model(folder: Path, tmp_path: Path) -> None:
    model, processor, _ = read_model(str(folder))
    skeleton = read_skeleton(str(folder))
    assert type(skeleton) is type(model) and all(parameter.is_meta for parameter in skeleton.parameters())
    offloaded, same, dtype, weights = read_offloaded(str(folder), tmp_path / "offloaded")
    assert type(offloaded) is type(model) and type(same) is type(processor)
    attach(offloaded, weights)
    assert torch.equal(logits(offloaded), logits(model))
    out = tmp_path / "out"
    out.mkdir()
    write_offloaded(offloaded, same, weights, dtype=dtype, gathered=False, folder=out, memory=2**30)
    assert torch.equal(logits(read_model(str(out))[0]), logits(model))


def test_a_checkpoint_that_names_no_class_has_no_head(tiny_bert: Path) -> None:
    config = json.loads((tiny_bert / "config.json").read_text())
    (tiny_bert / "config.json").write_text(json.dumps({**config, "architectures": None}))
    assert type(read_model(str(tiny_bert))[0]) is tf.BertModel


def test_a_class_that_transformers_lacks_is_named(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERMPRUNE_CACHE", str(tiny_bert.parent))  # which is not damaged
    config = json.loads((tiny_bert / "config.json").read_text())
    (tiny_bert / "config.json").write_text(json.dumps({**config, "architectures": ["BertForTelepathy"]}))
    with pytest.raises(PermpruneError, match=r"holds a BertForTelepathy, which Transformers .* does not have$"):
        read_model(str(tiny_bert))


def test_a_folder_without_processor_files_has_none(tiny_bert: Path, tiny_vit: Path) -> None:
    for file in [*tiny_bert.glob("tokenizer*"), tiny_vit / "preprocessor_config.json"]:
        file.unlink()
    assert read_model(str(tiny_bert))[1] is None  # Transformers makes up an empty tokenizer
    assert read_model(str(tiny_vit))[1] is None


@pytest.mark.parametrize(
    ("fixture", "file"), [("tiny_bert", "tokenizer.json"), ("tiny_vit", "preprocessor_config.json")]
)
def test_a_damaged_processor_is_one_line(fixture: str, file: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    (folder / file).write_text("{")
    with pytest.raises(PermpruneError, match=f"{folder} does not load: ") as caught:
        read_model(str(folder))
    assert "\n" not in str(caught.value)


def test_of_a_hub_id_whatever_loads_first_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, **options: bool) -> None:
        raise OSError(f"{source} has no preprocessor_config.json")

    monkeypatch.setattr(tf.AutoProcessor, "from_pretrained", fail)
    monkeypatch.setattr(tf.AutoTokenizer, "from_pretrained", lambda source, **_options: f"tokenizer of {source}")
    assert read_processor("owner/name") == "tokenizer of owner/name"
    for kind in (tf.AutoTokenizer, tf.AutoImageProcessor, tf.AutoFeatureExtractor):
        monkeypatch.setattr(kind, "from_pretrained", fail)
    with pytest.raises(OSError, match="has no preprocessor_config"):
        read_processor("owner/name")


def test_a_hub_that_is_out_of_reach_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each question takes half a minute of retries, and each kind of processor several."""

    def fail(source: str, **options: bool) -> None:
        asked.append(source)
        raise OSError("We couldn't connect")

    asked: list[str] = []
    for kind in (tf.AutoConfig, tf.AutoProcessor, tf.AutoTokenizer, tf.AutoImageProcessor, tf.AutoFeatureExtractor):
        monkeypatch.setattr(kind, "from_pretrained", fail)
    for read in (read_model, lambda name: read_offloaded(name, tmp_path)):
        with pytest.raises(PermpruneError, match="owner/name does not load: its config: We couldn't connect"):
            read("owner/name")
    assert asked == ["owner/name"] * 2


def test_sound_without_a_tokenizer_is_a_feature_extractor(tiny_ctc: Path) -> None:
    processor = read_model(str(tiny_ctc))[1]
    for file in ("processor_config.json", "vocab.json", "tokenizer_config.json"):
        (tiny_ctc / file).unlink()
    feature_extractor_of(processor).save_pretrained(tiny_ctc)
    assert isinstance(read_model(str(tiny_ctc))[1], tf.Wav2Vec2FeatureExtractor)


def test_a_processor_is_asked_for_its_parts(tiny_bert: Path, tiny_vit: Path, tiny_ctc: Path) -> None:
    text, image, speech = (read_model(str(folder))[1] for folder in (tiny_bert, tiny_vit, tiny_ctc))
    assert tokenizer_of(text) is text and image_processor_of(image) is image
    assert tokenizer_of(speech) is speech.tokenizer and feature_extractor_of(speech) is speech.feature_extractor
    for part, wrong in [
        (tokenizer_of, image),
        (tokenizer_of, None),
        (image_processor_of, text),
        (feature_extractor_of, image),
    ]:
        with pytest.raises(PermpruneError, match="the model has none"):
            part(wrong)
