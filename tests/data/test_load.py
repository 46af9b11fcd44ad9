"""Examples of whatever a model reads."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from permprune.checkpoints.io import read_model
from permprune.data import load as module
from permprune.data.load import load_examples
from permprune.examples import Examples
from permprune.zoo.images import CLASSES, Images


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty images in each part, of grey level 10 times their number, whose class is their number by tens."""
    numbers = np.arange(20)
    pixels = (10 * numbers).astype(np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    monkeypatch.setattr(module.zoo, "load_images", lambda part: Images(pixels, numbers // 10))


def loaded(folder: Path, names: Sequence[str], count: int, seed: int | None = None) -> Examples:
    """The zoo's images that a classifier of classes with these names is given."""
    model, processor, _ = read_model(str(folder))
    model.config.id2label = dict(enumerate(names))
    return load_examples(None, model, processor, part="calibration", count=count, seed=seed)


def drawn(folder: Path, count: int, seed: int | None) -> tuple[list[int], list[int]]:
    """The numbers and labels of the zoo's images that a classifier of ten classes without names is given."""
    found = loaded(folder, [f"LABEL_{number}" for number in range(10)], count, seed)
    levels = (found["pixel_values"].mean(dim=(1, 2, 3)) + 1) * 127.5
    return (levels / 10).round().int().tolist(), found["labels"].tolist()


@pytest.mark.usefixtures("zoo")
def test_the_images_of_the_zoo_are_drawn_by_seed(tiny_vit: Path) -> None:
    first = drawn(tiny_vit, 12, None)
    assert first == (list(range(12)), [0] * 10 + [1] * 2)
    numbers, labels = drawn(tiny_vit, 12, 0)
    assert numbers != first[0] and len(set(numbers)) == 12
    assert labels == [number // 10 for number in numbers]
    assert drawn(tiny_vit, 12, 0)[0] == numbers != drawn(tiny_vit, 12, 1)[0]
    assert sorted(drawn(tiny_vit, 50, 3)[0]) == list(range(20))


@pytest.mark.usefixtures("zoo")
def test_the_images_of_the_zoo_have_labels_by_the_names_of_the_classes(tiny_vit: Path) -> None:
    assert loaded(tiny_vit, [name.upper() for name in reversed(CLASSES)], 12)["labels"].tolist() == [9] * 10 + [8] * 2
    for others in ([str(number) for number in range(10)], [*CLASSES, "ship 2"], [*CLASSES[:9], "pizza"]):
        assert loaded(tiny_vit, others, 12).keys() == ["pixel_values"]
