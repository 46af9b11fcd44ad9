import json

from permprune.zoo import texts
from permprune.zoo.texts import RUN, split, text_file


def test_parts_share_no_review_and_lose_none():
    reviews = [f"review {i}" for i in range(5 * RUN + 7)]
    parts = split(reviews)
    assert sorted(parts["calibration"] + parts["evaluation"]) == sorted(reviews)
    assert set(parts["evaluation"]) == {f"review {i}" for i in range(4 * RUN, 5 * RUN)}


def test_repeated_reviews_are_dropped():
    parts = split(["Great film!", "great  FILM", "Bad film."])
    assert len(parts["calibration"]) == 2


def test_parts_are_mixed_and_always_alike():
    reviews = [f"review {i:04}" for i in range(RUN)]
    mixed = split(reviews)["calibration"]
    assert mixed == split(reversed(reviews))["calibration"]
    assert mixed != sorted(mixed)


def test_real_text():
    parts = {part: text_file(part).read_text(encoding="utf-8").rstrip("\n").split("\n") for part in texts.Part.__args__}
    documents = {part: {json.loads(line)["text"] for line in lines} for part, lines in parts.items()}
    assert len(documents["calibration"]) == len(parts["calibration"]) == 20000
    assert len(documents["evaluation"]) == len(parts["evaluation"])
    assert len(documents["evaluation"]) > 4800
    assert not documents["calibration"] & documents["evaluation"]
    assert not any("<br" in document for document in documents["evaluation"])
