"""Images with texts as inputs of vision-language models."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from permprune.data.images import has_images
from permprune.data.load import load_examples
from permprune.data.overlap import overlap
from permprune.errors import PermpruneError
from permprune.examples import IGNORED, Examples, batches
from permprune.models.forward import padding_of, run_model

from ..conversations import turns, write_rows
from ..vision_language import MODELS, idefics, qwen, write_images, write_pairs

Loaded = tuple[PreTrainedModel, ProcessorMixin, Examples]


def load(model: PreTrainedModel, processor: ProcessorMixin, source: Path | str, count: int = 6) -> Examples:
    return load_examples(str(source), model, processor, part="calibration", count=count)


@pytest.fixture(scope="module", params=MODELS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    model, processor = MODELS[request.param]()
    source = write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", 6)
    return model, processor, load(model, processor, source)


def test_labels_are_the_tokens_of_the_answers(loaded: Loaded) -> None:
    _, processor, examples = loaded
    assert len(examples) == 6
    ending = "<|im_end|>\n" if processor.chat_template else ""
    answers = ["two", "two of", "two of every", "two of every four"]
    for example in examples.split(1):
        labels = example["labels"]
        assert torch.equal(labels[labels != IGNORED], example["input_ids"][labels != IGNORED])
        assert processor.tokenizer.decode(labels[labels != IGNORED]) in [answer + ending for answer in answers]
        text = processor.tokenizer.decode(example["input_ids"][0])
        assert "which weights?" in text and "image" in text
        assert (example["attention_mask"] == 1)[labels != IGNORED].all()


@torch.no_grad()
def test_examples_alone_and_in_batches_have_the_same_logits(loaded: Loaded) -> None:
    model, _, examples = loaded
    whole = run_model(model, examples).logits
    for at in (torch.tensor([3]), torch.tensor([4, 1]), slice(1, 4)):
        part = examples[at]
        mask = part["attention_mask"].bool()
        torch.testing.assert_close(run_model(model, part).logits[mask], whole[at][mask], rtol=1e-4, atol=1e-4)
    for part in batches(examples, 2):
        assert part["labels"].shape == part["attention_mask"].shape
        assert part["attention_mask"].sum(1).max() == part["labels"].shape[1]


def test_padding_is_that_of_the_text_alone(loaded: Loaded) -> None:
    model, _, examples = loaded
    padding = padding_of(model, examples)
    x = torch.zeros(*examples["attention_mask"].shape, 32)  # as many activations as the text has could be an image's
    layers = {name: module for name, module in model.named_modules() if name.endswith(".0.mlp")}
    for name, module in layers.items():
        assert (padding.mask_of(x, module=module) is None) == ("vis" in name), name
    assert len(layers) == 2


def test_calibration_and_evaluation_share_no_image(tmp_path: Path) -> None:
    model, processor = idefics()
    source = str(write_pairs(tmp_path / "pairs", 12))
    first, second = (
        load_examples(source, model, processor, part=part, count=20, shared=True)  # type: ignore[arg-type]
        for part in ("calibration", "evaluation")
    )
    assert len(first) + len(second) == 12
    assert overlap([first], second) == 0 and overlap([first], first[1:]) == 1


def rows(folder: Path, table: str, **columns: str) -> Path:
    """A folder of two images with a table of these columns."""
    lines = [{"file_name": file.name, **columns} for file in write_images(folder, 2)]
    text = "\n".join(map(json.dumps, lines))
    if table.endswith(".csv"):
        text = "\n".join([",".join(lines[0]), *(",".join(line.values()) for line in lines)])
    (folder / table).write_text(text, encoding="utf-8")
    return folder


SOURCES: dict[str, Callable[[Path], Path | str]] = {
    "captions in a table": lambda folder: rows(folder, "metadata.jsonl", caption="two weights"),
    "questions in a table": lambda folder: rows(folder, "metadata.csv", prompt="which?", response="two weights"),
    "a data set": lambda folder: data_set(folder),
}


def data_set(folder: Path) -> str:
    files = write_images(folder / "images", 2)
    table = datasets.Dataset.from_dict({"image": [str(file) for file in files], "answers": [["two weights", "x"]] * 2})
    table = table.cast_column("image", datasets.Image())
    (folder / "hub").mkdir()
    table.to_parquet(folder / "hub" / "train.parquet")
    return f"{folder / 'hub'}@train"


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_of_images_with_texts(tmp_path: Path, kind: str) -> None:
    model, processor = qwen()
    examples = load(model, processor, SOURCES[kind](tmp_path))
    assert len(examples) == 2 and len(examples["image_grid_thw"]) == 2
    for labels in examples["labels"]:
        assert processor.tokenizer.decode(labels[labels != IGNORED]) == "two weights<|im_end|>\n"


def broken(folder: Path) -> Path:
    for file in rows(folder, "metadata.jsonl", caption="two").glob("*.png"):
        file.write_bytes(file.read_bytes()[:100])
    return folder


def long(folder: Path) -> Path:
    for file in rows(folder, "metadata.jsonl", caption="two").glob("*.png"):
        Image.new("RGB", (1000, 2)).save(file)
    return folder


def bare(folder: Path) -> Path:
    write_images(folder, 1)
    return folder


def stored(folder: Path) -> Path:
    return Path(data_set(folder).removesuffix("@train"), "train.parquet")


UNREAD = r"that cannot be read: give a folder of the files with a metadata\.jsonl"
FAULTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "images in the cells of a file": (stored, f'has images in its column "image" {UNREAD}'),
    "conversations about images": (
        lambda f: write_rows(f / "c.jsonl", [{"messages": turns("which?", "two"), "images": ["0.png"]}]),
        f'has images in its column "images" {UNREAD}',
    ),
    "an image that is damaged": (broken, r"cannot read the image .*\.png: remove or repair it"),
    "a row without text": (
        lambda f: rows(f, "metadata.jsonl", caption=" "),
        r"\.png has no text in its column caption: write",
    ),
    "no column of text": (
        lambda f: rows(f, "metadata.csv", size="1"),
        "has none of the columns answer, .*: it has file_name, size",
    ),
    "an image without text": (bare, r"0\.png has none of the columns answer"),
    "an image that the processor refuses": (long, r"\.png: the model's processor fails .*aspect ratio"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_one_line(tmp_path: Path, fault: str) -> None:
    make, message = FAULTS[fault]
    model, processor = qwen()
    with pytest.raises(PermpruneError, match=message) as caught:
        load(model, processor, make(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_template_of_the_tokenizer_alone_is_none_of_images(tmp_path: Path) -> None:
    model, processor = qwen()
    processor.tokenizer.chat_template, processor.chat_template = processor.chat_template, None
    examples = load(model, processor, write_pairs(tmp_path / "pairs", 2))
    assert "im_end" not in processor.tokenizer.decode(examples["input_ids"][0])


def test_models_without_images_or_their_processor_say_so(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write_pairs(tmp_path / "pairs", 2)
    with pytest.raises(PermpruneError, match="holds images, and LlamaForCausalLM takes none: give text alone"):
        load_examples(str(source), tiny_llama, tiny_tokenizer, part="calibration", count=2)
    model, processor = qwen()
    with pytest.raises(PermpruneError, match="images with texts need a processor of both"):
        load(model, processor.tokenizer, source)
    processor.chat_template = "{{ raise_exception('only text') }}"
    with pytest.raises(PermpruneError, match="the model's processor fails on an image with text: only text"):
        load(model, processor, source)


def test_a_data_set_with_a_picture_in_its_description_is_text(tmp_path: Path) -> None:
    write_images(tmp_path / "assets", 1)
    assert has_images(tmp_path, "calibration", hub=False)
    (tmp_path / "train.jsonl").write_text('{"text": "two of every four"}\n', encoding="utf-8")
    assert not has_images(tmp_path, "calibration", hub=False)


def test_text_alone_still_calibrates_a_vision_language_model(tiny_text: Path) -> None:
    model, processor = qwen()
    found = load_examples(str(tiny_text), model, processor, part="calibration", count=3, length=16)
    assert found.keys() == ["input_ids"] and found["input_ids"].shape == (3, 16)
