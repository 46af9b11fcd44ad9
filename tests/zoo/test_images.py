import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from permprune.zoo import images
from permprune.zoo.images import CLASSES, SHARES, Images, load_images, read_task, split


def _random(count: int) -> Images:
    generator = np.random.default_rng(0)
    return Images(generator.integers(256, size=(count, 4, 4, 3), dtype=np.uint8), np.arange(count) % len(CLASSES))


def _keys(chosen: Images) -> list[tuple[bytes, int]]:
    return [(pixels.tobytes(), int(label)) for pixels, label in zip(chosen.pixels, chosen.labels, strict=True)]


def test_parts_share_no_image_and_lose_none():
    whole = _random(2000)
    parts = split(whole)
    assert list(parts) == list(SHARES)
    assert sorted(key for part in parts.values() for key in _keys(part)) == sorted(_keys(whole))
    for name, share in SHARES.items():
        assert abs(len(parts[name].labels) - 200 * share) < 70  # three standard deviations


def test_equal_images_go_together_whatever_their_order():
    whole = _random(50)
    twice = Images(np.concatenate([whole.pixels, whole.pixels[::-1]]), np.concatenate([whole.labels] * 2))
    pixels = [{image.tobytes() for image in part.pixels} for part in split(twice).values()]
    assert sum(map(len, pixels)) == len(set.union(*pixels)) == 50


def test_parts_are_mixed_and_always_alike():
    whole = _random(200)
    backwards = Images(whole.pixels[::-1], whole.labels[::-1])
    parts = split(whole)
    for name, part in split(backwards).items():
        assert _keys(part) == _keys(parts[name])
    assert _keys(parts["probe"]) != [key for key in _keys(whole) if key in set(_keys(parts["probe"]))]


@pytest.fixture
def task(tmp_path):
    """A task file of 20 images, and what it holds."""
    whole = _random(20)
    examples = []
    for pixels, label in zip(whole.pixels, whole.labels, strict=True):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, format="PNG")
        scores = {name: int(name == CLASSES[label]) for name in CLASSES}
        examples.append({"input": base64.b64encode(stream.getvalue()).decode(), "target_scores": scores})
    file = tmp_path / "task.json"
    file.write_text(json.dumps({"examples": examples}))
    return file, whole


def test_reads_a_task(task):
    file, whole = task
    assert _keys(read_task(file)) == _keys(whole)


def test_cached_parts_are_those_of_the_task(task, tmp_path, monkeypatch):
    file, whole = task
    monkeypatch.setenv("PERMPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(images, "fetch", lambda *_args: [file])
    parts = {part: load_images(part) for part in SHARES}
    file.unlink()
    for name, part in split(whole).items():
        assert _keys(parts[name]) == _keys(load_images(name)) == _keys(part)
        assert (part.pixels.dtype, part.labels.dtype) == (np.uint8, np.int64)
