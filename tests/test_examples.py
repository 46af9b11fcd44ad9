"""Named tensors of one first dimension."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from permprune.errors import PermpruneError
from permprune.examples import Examples, by_length


@pytest.fixture
def images() -> Examples:
    return Examples({"pixel_values": torch.arange(5 * 12).view(5, 3, 2, 2), "labels": torch.arange(5)})


def test_slices_and_indices_select_from_every_tensor(images: Examples) -> None:
    assert len(images) == 5 and list(images) == ["pixel_values", "labels"]
    for part, expected in ((images[1:3], [1, 2]), (images[torch.tensor([4, 0, 4])], [4, 0, 4])):
        assert len(part) == len(expected) and part["labels"].tolist() == expected
        assert torch.equal(part["pixel_values"], images["pixel_values"][expected])


def test_parts_are_all_of_it_in_order(images: Examples) -> None:
    for parts, sizes in ((images.split(2), [2, 2, 1]), (images.split([1, 0, 4]), [1, 0, 4])):
        assert [len(part) for part in parts] == sizes
        assert torch.equal(torch.cat([part["pixel_values"] for part in parts]), images["pixel_values"])


def test_stands_for_keyword_arguments(images: Examples) -> None:
    assert dict(**images).keys() == {"pixel_values", "labels"}
    assert "labels" in images and "input_ids" not in images and images.get("input_ids") is None
    assert "pixel_values: (5, 3, 2, 2)" in repr(images)


def test_token_ids_and_mappings_are_taken_as_examples(images: Examples) -> None:
    ids = torch.arange(6).view(2, 3)
    assert Examples.of(images) is images
    assert torch.equal(Examples.of(ids)["input_ids"], ids)
    assert Examples.of({"input_ids": ids, "labels": ids[:, 0]}).keys() == ["input_ids", "labels"]


@pytest.mark.parametrize("tensors", [{}, {"pixel_values": torch.zeros(2, 3), "labels": torch.zeros(3)}])
def test_tensors_of_other_lengths_are_refused(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(PermpruneError, match="give named tensors with the same first dimension"):
        Examples(tensors)


def test_batches_of_one_length_lose_their_padding() -> None:
    lengths = torch.tensor([5, 2, 4, 2, 5, 3, 1])
    mask = (torch.arange(9) < lengths[:, None]).long()
    examples = Examples({"input_ids": mask * 7, "attention_mask": mask, "labels": torch.arange(7)})
    batches = by_length(examples, 3)
    assert [examples[at].trimmed()["input_ids"].shape for at in batches] == [(3, 2), (3, 5), (1, 5)]
    mixed = by_length(examples, 3, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(mixed).tolist()) == list(range(7))
    assert mixed[0].tolist() != by_length(examples, 3, torch.Generator().manual_seed(5))[0].tolist()
    positions = Examples({**examples, "labels": mask})[1:3]  # labels of 0 where the texts are padded
    assert positions.trimmed() is positions
    ignored = Examples({**examples, "labels": mask.masked_fill(mask == 0, -100)})[1:3]
    assert ignored.trimmed()["labels"].shape == ignored.trimmed()["input_ids"].shape == (2, 4)
    decoded = Examples({**ignored, "decoder_input_ids": mask[1:3]}).trimmed()
    assert decoded["input_ids"].shape == (2, 4)
    assert decoded["decoder_input_ids"].shape == decoded["labels"].shape == (2, 9)


@pytest.fixture
def packed() -> Examples:
    """Three texts with images of 4, 8 and 4 patches; a patch has the number of its text."""
    grids = torch.tensor([[1, 2, 2], [1, 2, 4], [1, 4, 1]])
    patches = torch.arange(3).repeat_interleave(grids.prod(1))[:, None].expand(-1, 6)
    return Examples({"input_ids": torch.arange(3)[:, None], "pixel_values": patches, "image_grid_thw": grids})


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_cropped_texts_are_parts_between_their_first_and_last_tokens(lengths: list[int], seed: int) -> None:
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    ids = torch.arange(12).repeat(len(lengths), 1)
    texts = Examples({"input_ids": ids, "attention_mask": mask, "kind": mask * 3, "decoder_input_ids": ids})
    cropped = texts.cropped(torch.Generator().manual_seed(seed))
    assert torch.equal(cropped["decoder_input_ids"], ids)
    for row, length in enumerate(lengths):
        kept = cropped["input_ids"][row][cropped["attention_mask"][row] > 0].tolist()
        assert cropped["attention_mask"][row].sum() == len(kept) and cropped["kind"][row, : len(kept)].eq(3).all()
        assert cropped["attention_mask"][row, : len(kept)].all()
        first, *inner = kept
        assert first == 0
        if length > 1:
            assert inner.pop() == length - 1
            assert len(inner) >= (length - 2) / 2
            assert all(after == before + 1 for before, after in itertools.pairwise(inner))


def test_texts_with_labels_and_padding_in_front_are_not_cropped(images: Examples) -> None:
    ids, mask = torch.arange(8).repeat(2, 1), torch.ones(2, 8, dtype=torch.int64)
    labelled = Examples({"input_ids": ids, "attention_mask": mask, "labels": ids})
    in_front = Examples({"input_ids": ids, "attention_mask": mask.index_fill(1, torch.tensor([0]), 0)})
    for examples in (images, labelled, in_front, Examples({"input_ids": ids})):
        assert examples.cropped(torch.Generator()) is examples


def test_rows_of_an_example_stay_with_it(packed: Examples) -> None:
    assert len(packed) == 3
    for at, expected in ((slice(1, 3), [1, 2]), (torch.tensor([2, 0, 2]), [2, 0, 2]), (slice(0, 0), [])):
        part = packed[at]
        assert part["input_ids"].flatten().tolist() == expected and len(part) == len(expected)
        counts = [[4, 8, 4][number] for number in expected]
        assert part["pixel_values"][:, 0].tolist() == [
            n for n, count in zip(expected, counts, strict=True) for _ in range(count)
        ]
    for parts in (packed.split(1), packed.split([1, 2])):
        again = Examples.join(parts)
        assert all(torch.equal(again[name], packed[name]) for name in packed) and again.digest == packed.digest
    assert packed.to(torch.device("meta"))[1:2]["pixel_values"].shape == (8, 6)
    assert packed.trimmed()[2:]["pixel_values"].shape == (4, 6)


def test_batches_with_packed_images_are_joined(packed: Examples) -> None:
    batches = [{name: part[name] for name in part} for part in packed.split([1, 2])]
    several = {**batches[0], "pixel_values": torch.full((12, 6), 3), "image_grid_thw": packed["image_grid_thw"][:2]}
    joined = Examples.of([*batches, several])
    assert [len(part["pixel_values"]) for part in joined.split(1)] == [4, 8, 4, 12]
    assert [len(part["image_grid_thw"]) for part in joined.split(1)] == [1, 1, 1, 2]
    with pytest.raises(PermpruneError, match="texts with several images one by one"):
        Examples({**packed, "image_grid_thw": packed["image_grid_thw"][:2]})


def test_numbers_and_sizes_of_images_are_padded_where_their_sizes_are_known() -> None:
    def tiles(count: int, width: int = 4, **more: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.ones(1, 3), "pixel_values": torch.ones(1, count, 3, 4, width), **more}

    joined = Examples.of([tiles(2), tiles(3)])
    assert joined["pixel_values"].shape == (2, 3, 3, 4, 4) and not joined["pixel_values"][0, 2].any()
    with pytest.raises(PermpruneError, match="pixel_values of different shapes"):
        Examples.of([tiles(2), tiles(2, width=8)])
    sized = [tiles(2, width, image_sizes=torch.tensor([[4, width]])) for width in (4, 8)]
    assert Examples.of(sized)["pixel_values"].shape == (2, 2, 3, 4, 8)


def texts(*lengths: int) -> dict[str, torch.Tensor]:
    """A batch of texts of 1 + number, padded to the longest."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = mask * torch.arange(1, 1 + len(lengths))[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def test_batches_of_any_length_are_joined_and_padded() -> None:
    examples = Examples.of(iter([texts(3, 2), texts(5)]))
    assert examples["input_ids"].tolist() == [[1, 1, 1, 0, 0], [2, 2, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert examples["attention_mask"].sum(1).tolist() == [3, 2, 5]
    assert examples["labels"].tolist()[1] == [2, 2, -100, -100, -100]


def test_no_more_batches_are_read_than_are_needed() -> None:
    def endless() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield {"pixel_values": torch.zeros(4, 3, 2, 2)}

    assert len(Examples.of(endless(), most=10)) == 10


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "has no batches"),
        ([(torch.zeros(2, 3),)], "a calibration batch is tuple: give dicts of tensors"),
        ([{"input_ids": [1, 2]}], "give dicts of tensors"),
        ([texts(2), {"input_ids": torch.ones(1, 2)}], "different tensors"),
        ([{"input_ids": torch.ones(1, 2)}, {"input_ids": torch.ones(1, 3)}], "pad them to one, or give an attention"),
    ],
)
def test_batches_that_do_not_go_together_are_refused(batches: list[Any], message: str) -> None:
    with pytest.raises(PermpruneError, match=message):
        Examples.of(batches)
