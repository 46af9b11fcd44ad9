"""Images and their classes."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedModel, ViTConfig, ViTForImageClassification, ViTModel

from permprune.checkpoints.io import read_model
from permprune.data.images import load_images
from permprune.data.items import Selection
from permprune.errors import PermpruneError
from permprune.models.processors import Processor

Classifier = tuple[PreTrainedModel, Processor]
SMALL: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}


@pytest.fixture
def classifier(tiny_vit: Path) -> Classifier:
    model, processor, _ = read_model(str(tiny_vit))
    assert processor is not None
    return model, processor


def paint(path: Path, level: int) -> Path:
    """An image of one grey level, by which it is known again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 12), (level,) * 3).save(path)
    return path


def levels(pixels: torch.Tensor) -> list[int]:
    """The grey level of each image: the processor maps 0 to 255 on -1 to 1."""
    return ((pixels.mean(dim=(1, 2, 3)) + 1) * 127.5).round().int().tolist()


def by_level(found: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    return sorted(zip(levels(found["pixel_values"]), found["labels"].tolist(), strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images in two classes."""
    for level, name in ((10, "cat/a.png"), (20, "cat/deep/b.PNG"), (200, "owl/a.bmp"), (220, "owl/b.webp")):
        paint(tmp_path / "images" / name, level)
    return tmp_path / "images"


def test_sub_folders_are_classes(classifier: Classifier, folder: Path) -> None:
    found = load_images(folder, *classifier, Selection("calibration", 9))
    assert by_level(found) == [(10, 0), (20, 0), (200, 2), (220, 2)]
    assert found["pixel_values"].shape == (4, 3, 16, 16)
    assert classifier[0](**found).loss.isfinite()


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.tsv"])
def test_a_table_names_classes(classifier: Classifier, folder: Path, name: str) -> None:
    rows = [("owl/a.bmp", "cat"), ("cat/a.png", "2")]
    if name.endswith("jsonl"):
        text = "\n".join(json.dumps({"file_name": file, "label": label}) for file, label in rows)
    else:
        text = "\n".join([",".join(row) for row in [("file_name", "class"), *rows]])
        text = text.replace(",", "\t") if name.endswith("tsv") else text
    (folder / name).write_text(text)
    found = load_images(folder, *classifier, Selection("calibration", 9))
    assert by_level(found) == [(10, 2), (200, 0)]


def test_draws_are_deterministic_and_halves_apart(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for level in range(40):
        paint(tmp_path / "many" / f"{level:02}.png", 4 * level)

    def drawn(part: str, seed: int = 0, shared: bool = True, count: int = 40) -> list[int]:
        found = load_images(tmp_path / "many", *classifier, Selection(part, count, seed, shared))  # type: ignore[arg-type]
        return levels(found["pixel_values"])

    assert drawn("calibration") == drawn("calibration") != drawn("calibration", seed=1)
    assert sorted(drawn("calibration") + drawn("evaluation", seed=1)) == list(range(0, 160, 4))
    assert drawn("evaluation", shared=False, count=3) == drawn("calibration", shared=False, count=5)[:3]
    half = sorted(drawn("calibration"))
    monkeypatch.chdir(tmp_path)
    found = load_images("many", *classifier, Selection("calibration", 40, shared=True))
    assert sorted(levels(found["pixel_values"])) == half


def test_unlabelled_images_have_no_labels(classifier: Classifier, tmp_path: Path) -> None:
    paint(tmp_path / "flat" / "a.png", 7)
    assert load_images(tmp_path / "flat", *classifier, Selection("evaluation", 1)).keys() == {"pixel_values"}


def test_a_model_without_a_head_gets_no_labels(classifier: Classifier, folder: Path) -> None:
    (folder / "cat").rename(folder / "unheard of")
    found = load_images(folder, ViTModel(ViTConfig(**SMALL)), classifier[1], Selection("evaluation", 4))
    assert found.keys() == {"pixel_values"}


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "1"])
def test_images_of_any_mode_become_colour(classifier: Classifier, tmp_path: Path, mode: str) -> None:
    (tmp_path / "modes").mkdir()
    Image.new("RGB", (8, 8)).convert("L").convert(mode).save(tmp_path / "modes" / "a.png")
    found = load_images(tmp_path / "modes", *classifier, Selection("evaluation", 1))
    assert found["pixel_values"].shape == (1, 3, 16, 16)


def test_a_model_of_one_channel_sees_grey(tmp_path: Path) -> None:
    settings = {"size": {"height": 16, "width": 16}, "image_mean": [0.5], "image_std": [0.5]}
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", **settings})
    )
    model = ViTForImageClassification(ViTConfig(**SMALL, num_channels=1))
    paint(tmp_path / "grey" / "a.png", 30)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    found = load_images(tmp_path / "grey", model, processor, Selection("evaluation", 1))["pixel_values"]
    assert found.shape == (1, 1, 16, 16) and levels(found) == [30]


def test_a_photograph_stands_upright(classifier: Classifier, tmp_path: Path) -> None:
    (tmp_path / "photo").mkdir()
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a right angle
    Image.fromarray(pixels).save(tmp_path / "photo" / "a.png", exif=exif)
    found = load_images(tmp_path / "photo", *classifier, Selection("evaluation", 1))["pixel_values"]
    assert (found[0, :, :8] == 1).all() and (found[0, :, 8:] == -1).all()


def test_a_data_set(classifier: Classifier, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [str(folder / "owl" / "a.bmp"), str(folder / "cat" / "a.png")]
    kinds = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["owl", "cat"])})
    rows = datasets.Dataset.from_dict({"img": files, "label": [0, 1]}, kinds).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: rows)
    assert by_level(load_images("name", *classifier, Selection("calibration", 9))) == [(10, 0), (200, 2)]


def test_a_data_set_without_files_is_refused(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"image": ["words"], "img": ["more"]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: rows)
    with pytest.raises(PermpruneError, match="name, row 0 holds no file"):
        load_images("name", *classifier, Selection("calibration", 9))
    words = datasets.Dataset.from_dict({"words": ["more"]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: words)
    with pytest.raises(PermpruneError, match="name has none of the columns image, img: it has words"):
        load_images("name", *classifier, Selection("calibration", 9))


def test_what_is_no_image_is_named(classifier: Classifier, folder: Path) -> None:
    (folder / "owl" / "a.bmp").write_bytes(b"BM no image")
    with pytest.raises(PermpruneError, match=r"cannot read the image .*owl/a\.bmp"):
        load_images(folder, *classifier, Selection("evaluation", 9))
    whole = (folder / "cat" / "a.png").read_bytes()
    (folder / "owl" / "a.bmp").unlink()
    (folder / "cat" / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PermpruneError, match=r"cannot read the image .*cat/a\.png"):
        load_images(folder, *classifier, Selection("evaluation", 9))


def test_bad_sources_are_one_line(classifier: Classifier, folder: Path, tmp_path: Path) -> None:
    model, processor = classifier
    (tmp_path / "empty").mkdir()
    with pytest.raises(PermpruneError, match=r"empty holds no images: give a folder of \.bmp"):
        load_images(tmp_path / "empty", model, processor, Selection("evaluation", 9))
    with pytest.raises(PermpruneError, match="no images at"):
        load_images("./none", model, processor, Selection("evaluation", 9))
    with pytest.raises(PermpruneError, match=r"a\.png is a file: give the folder of the images"):
        load_images(folder / "cat" / "a.png", model, processor, Selection("evaluation", 9))
    with pytest.raises(PermpruneError, match="the model has none"):
        load_images(folder, model, None, Selection("evaluation", 9))
    paint(folder / "a.png", 3)
    with pytest.raises(PermpruneError, match=r"images/a\.png has no label"):
        load_images(folder, model, processor, Selection("evaluation", 9))
    (folder / "a.png").unlink()
    (folder / "owl").rename(folder / "eagle")
    with pytest.raises(PermpruneError, match='has the label "eagle", which the model does not know: it knows cat, dog'):
        load_images(folder, model, processor, Selection("evaluation", 9))
    (folder / "metadata.csv").write_text("file_name,label\nnone.png,cat\n")
    with pytest.raises(PermpruneError, match=r"lists none\.png, and there is no such file"):
        load_images(folder, model, processor, Selection("evaluation", 9))


def test_images_of_several_sizes_need_a_size(classifier: Classifier, tmp_path: Path) -> None:
    for width in (16, 20):
        paint(tmp_path / "sizes" / f"{width}.png", 3)
    Image.new("RGB", (16, 16)).save(tmp_path / "sizes" / "16.png")
    classifier[1].do_resize = False  # type: ignore[union-attr]
    with pytest.raises(PermpruneError, match=r"set a size in the model's preprocessor_config\.json"):
        load_images(tmp_path / "sizes", *classifier, Selection("evaluation", 2))
