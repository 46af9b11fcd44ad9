"""What a model is shown: named tensors, one example a row."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.system.digests import digest_of

IGNORED = -100
"""The label of positions that have none."""

SORTED = 50
"""Batches whose examples are sorted by length together."""


class Examples:
    """Tensors by the names of the model's arguments, all of one first dimension; immutable.

    Text has "input_ids" (count, length), int64, and "attention_mask" of that shape where some of it is padding (0);
    images "pixel_values" (count, channels, height, width); speech "input_features" (count, bins, frames). What is right
    goes by "labels": a class for each example, int64 (count,), or for each position, (count, length), -100 where there
    is none; without labels the name is absent. `len` counts examples; slices and index tensors select them.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        counts = {name: len(tensor) for name, tensor in tensors.items()}
        if not counts or len(set(counts.values())) > 1:
            given = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no tensors"
            raise PermpruneError(f"examples with {given}: give tensors of one first dimension, by name")
        self._tensors = dict(tensors)

    @classmethod
    def of(cls, data: ExampleData, most: int | None = None) -> Examples:
        """Named tensors, token ids (count, length), or batches of named tensors, as examples.

        Batches are what an iterable such as a `DataLoader` gives; no more of them are read than hold `most` examples.
        Texts of other lengths are padded at the end, if the batches have an "attention_mask". Raises `PermpruneError`
        for batches that are not named tensors, and for those that do not go together.
        """
        if isinstance(data, Examples):
            return data
        if isinstance(data, Tensor):
            return cls({"input_ids": data})
        return cls(data) if isinstance(data, Mapping) else cls._join(data, most)

    @classmethod
    def _join(cls, batches: Iterable[Mapping[str, Tensor]], most: int | None) -> Examples:
        found: list[Mapping[str, Tensor]] = []
        count = 0
        for batch in batches:
            if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
                raise PermpruneError(
                    f"a batch of the calibration is {type(batch).__name__}: give dicts of tensors by the names of the "
                    "model's arguments"
                )
            found.append({name: tensor.cpu() for name, tensor in batch.items()})
            count += len(cls(batch))
            if most is not None and count >= most:
                break
        if not found:
            raise PermpruneError("the calibration has no batches: give an iterable that can be read again")
        if any(batch.keys() != found[0].keys() for batch in found):
            raise PermpruneError("batches of the calibration have tensors of other names: give the same in each")
        return cls({name: _joined([batch[name] for batch in found], found[0], name) for name in found[0]})[:most]

    @overload
    def __getitem__(self, at: str) -> Tensor: ...
    @overload
    def __getitem__(self, at: slice | Tensor) -> Examples: ...
    def __getitem__(self, at: str | slice | Tensor) -> Tensor | Examples:
        """The tensor of that name, or the examples at those places (a slice, or int64 indices)."""
        if isinstance(at, str):
            return self._tensors[at]
        return Examples({name: tensor[at] for name, tensor in self._tensors.items()})

    def __len__(self) -> int:
        return len(next(iter(self._tensors.values())))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in self._tensors.items())
        return f"Examples({shapes})"

    def keys(self) -> list[str]:
        """The names; `**examples` are the tensors as keyword arguments."""
        return list(self._tensors)

    def get(self, name: str) -> Tensor | None:
        """The tensor of that name; None if there is none."""
        return self._tensors.get(name)

    def split(self, sizes: int | list[int]) -> list[Examples]:
        """Runs of so many examples, the last one perhaps shorter; or runs of the sizes listed, which add up to all."""
        names = self._tensors.keys()
        parts = zip(*(tensor.split(sizes) for tensor in self._tensors.values()), strict=True)
        return [Examples(dict(zip(names, part, strict=True))) for part in parts]

    def trimmed(self) -> Examples:
        """Texts with one label each or none, without the columns at the end that are padding in all of them.

        Other examples as they are.
        """
        mask, labels = self.get("attention_mask"), self.get("labels")
        if mask is None or "input_ids" not in self or (labels is not None and labels.dim() > 1):
            return self
        longest = max(1, int((mask.any(0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).max()))
        cut = {name: tensor[:, :longest] for name, tensor in self._tensors.items() if tensor.shape == mask.shape}
        return Examples({**self._tensors, **cut})

    def to(self, device: torch.device) -> Examples:
        return Examples({name: tensor.to(device) for name, tensor in self._tensors.items()})

    @cached_property
    def digest(self) -> str:
        """Of all their values, wherever they lie."""
        return digest_of(sorted(self._tensors.items()))

    @property
    def device(self) -> torch.device:
        return next(iter(self._tensors.values())).device


def _joined(tensors: list[Tensor], names: Container[str], name: str) -> Tensor:
    """Tensors (count, ...) one after the other, texts padded to one length."""
    shapes = {tensor.shape[1:] for tensor in tensors}
    if len(shapes) == 1:
        return torch.cat(tensors)
    if "attention_mask" not in names or {len(shape) for shape in shapes} != {1}:
        raise PermpruneError(
            f"batches of the calibration have {name} of other shapes: pad them to one, or give an attention_mask"
        )
    length, filler = max(shape[0] for shape in shapes), IGNORED if name == "labels" else 0
    return torch.cat([F.pad(tensor, (0, length - tensor.shape[1]), value=filler) for tensor in tensors])


def batches(examples: Examples, batch: int) -> list[Examples]:
    """All examples in batches: texts by length, without needless padding; others as they come."""
    if examples.get("attention_mask") is None:
        return examples.split(batch)
    return [examples[at].trimmed() for at in by_length(examples, batch)]


def by_length(examples: Examples, batch: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Batches of examples of about one length, as indices int64 (batch,); the last may be smaller.

    Given a generator, the examples are mixed before runs of `SORTED` batches are sorted by length, and the batches
    after it.
    """
    mask = examples.get("attention_mask")
    lengths = torch.zeros(len(examples)) if mask is None else mask.flatten(1).sum(1).cpu()
    if generator is None:
        return list(lengths.argsort(stable=True).split(batch))
    runs = torch.randperm(len(examples), generator=generator).split(SORTED * batch)
    found = [own for run in runs for own in run[lengths[run].argsort(stable=True)].split(batch)]
    return [found[at] for at in torch.randperm(len(found), generator=generator).tolist()]


ExampleData = Examples | Mapping[str, Tensor] | Tensor | Iterable[Mapping[str, Tensor]]
"""What `Examples.of` takes."""

Part = Literal["calibration", "evaluation"]
