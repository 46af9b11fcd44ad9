"""Examples: the inputs of a model, and labels, as named tensors with one row per example."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.system.digests import digest_of

IGNORED = -100
"""The label of positions without a label, which losses ignore."""

IMAGES = ("pixel_values", "pixel_attention_mask")
SIZES = {"pixel_attention_mask", "image_sizes"}
"""Names of images and their masks, and of the tensors which tell a model the sizes of images that are padded."""

SORTED = 50
"""Number of batches whose examples are sorted by length together."""


class Examples:
    """Tensors by the names of the model's arguments, all with the same first dimension; immutable.

    Text has "input_ids", int64 (count, length), and if it is padded "attention_mask" of the same shape, which is 0 for
    padding. "labels", if present, are one class per example, int64 (count,), or one per position, int64
    (count, length), with -100 for positions without a label. `len` returns the number of examples; slices and index
    tensors select examples.

    A tensor can also have several rows for each example, such as patches of images: `rows` has their numbers, int64
    (count,), by the name of the tensor. Without it, they are known if there is one example, or one image in each.
    Raises `PermpruneError` if there are no tensors, or if their first dimensions do not fit.
    """

    def __init__(self, tensors: Mapping[str, Tensor], rows: Mapping[str, Tensor] | None = None) -> None:
        self._tensors = dict(tensors)
        self._rows = _known_rows(tensors) if rows is None else dict(rows)
        counts = {name: len(self._rows.get(name, tensor)) for name, tensor in tensors.items()}
        unlike = [name for name, rows in self._rows.items() if int(rows.sum()) != len(tensors[name])]
        if not counts or len(set(counts.values())) > 1 or unlike:
            given = ", ".join(f"{len(tensor)} {name}" for name, tensor in tensors.items()) or "no tensors"
            raise PermpruneError(
                f"examples with {given}: give named tensors with the same first dimension, and texts with several "
                "images one by one"
            )

    @classmethod
    def of(cls, data: ExampleData, most: int | None = None) -> Examples:
        """Create examples from named tensors, token ids (count, length), or an iterable of batches of named tensors.

        Batches are read, for example from a `DataLoader`, until there are `most` examples, and joined as by `join`.
        Raises `PermpruneError` if a batch is not a dict of tensors, or if batches differ in names or shapes.
        """
        if isinstance(data, Examples):
            return data
        if isinstance(data, Tensor):
            return cls({"input_ids": data})
        if isinstance(data, Mapping):
            return cls(data)
        parts, count = list[Examples](), 0
        for batch in data:
            if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
                raise PermpruneError(
                    f"a calibration batch is {type(batch).__name__}: give dicts of tensors by the names of the "
                    "model's arguments"
                )
            parts.append(cls({name: tensor.cpu() for name, tensor in batch.items()}))
            count += len(parts[-1])
            if most is not None and count >= most:
                break
        if not parts:
            raise PermpruneError("the calibration has no batches: give an iterable that can be read again")
        return cls.join(parts)[:most]

    @classmethod
    def join(cls, parts: list[Examples]) -> Examples:
        """Join examples, in order. Raises `PermpruneError` if the names of the tensors differ, or their shapes.

        Texts are padded at the end if they have an "attention_mask", and images if they have a "pixel_attention_mask"
        or "image_sizes".
        """
        names = parts[0]._tensors.keys()
        if any(set(part) != set(names) for part in parts):
            raise PermpruneError("the calibration batches have different tensors: give the same names in each")
        rows = {}
        for name in {name for part in parts for name in part._rows}:
            rows[name] = torch.cat([part._rows.get(name, torch.ones(len(part), dtype=torch.int64)) for part in parts])
        return cls({name: _joined([part[name] for part in parts], names, name) for name in names}, rows)

    @classmethod
    def interleave(cls, parts: list[Examples]) -> Examples:
        """Join examples as `join` does, each part evenly spread; parts of equal length take turns."""
        if len(parts) == 1:
            return parts[0]
        turns = torch.cat([(torch.arange(len(part), dtype=torch.float64) + 0.5) / len(part) for part in parts])
        return cls.join(parts)[turns.argsort(stable=True)]

    @overload
    def __getitem__(self, key: str) -> Tensor: ...
    @overload
    def __getitem__(self, key: slice | Tensor) -> Examples: ...
    def __getitem__(self, key: str | slice | Tensor) -> Tensor | Examples:
        """Return the tensor of that name, or the examples at these positions (a slice, or int64 indices)."""
        if isinstance(key, str):
            return self._tensors[key]
        places: dict[str, slice | Tensor] = {}
        for name, rows in self._rows.items():
            spans = torch.arange(int(rows.sum())).split(rows.tolist())
            places[name] = torch.cat([spans[one] for one in torch.arange(len(rows))[key].tolist()] or [rows[:0]])
        tensors = {name: tensor[places.get(name, key)] for name, tensor in self._tensors.items()}
        return Examples(tensors, {name: counts[key] for name, counts in self._rows.items()})

    def __len__(self) -> int:
        name, tensor = next(iter(self._tensors.items()))
        return len(self._rows.get(name, tensor))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in self._tensors.items())
        return f"Examples({shapes})"

    def keys(self) -> list[str]:
        """Return the names of the tensors; with this method, `**examples` passes the tensors as keyword arguments."""
        return list(self._tensors)

    def get(self, name: str) -> Tensor | None:
        """Return the tensor of that name; None if there is none."""
        return self._tensors.get(name)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Examples:
        """Return the examples with these tensors, of one row for each, added or in place of those of their names."""
        return Examples({**self._tensors, **tensors}, self._rows)

    def split(self, sizes: int | list[int]) -> list[Examples]:
        """Split the examples, in order, into parts of these `sizes`, or of one size; the last may be smaller."""
        parts = torch.arange(len(self)).split(sizes)
        return [self[int(part[0]) : int(part[-1]) + 1] if len(part) else self[:0] for part in parts]

    def trimmed(self) -> Examples:
        """Remove the columns at the end that are padding in all texts, unless there are labels in them.

        A decoder's texts ("decoder_input_ids") stay as long as they are, with their labels.
        """
        mask, labels = self.get("attention_mask"), self.get("labels")
        if mask is None or "input_ids" not in self:
            return self
        longest = max(1, int((mask.any(0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).max()))
        if labels is not None and labels.dim() > 1 and labels[:, longest:].ne(IGNORED).any():
            return self
        return self.with_tensors({name: tensor[:, :longest] for name, tensor in self._beside(mask).items()})

    def cropped(self, generator: torch.Generator) -> Examples:
        """Cut each text without labels to a random part of half of its tokens or more; the first and last stay."""
        mask = self.get("attention_mask")
        if mask is None or "input_ids" not in self or "labels" in self or not mask[:, 0].all():
            return self
        inner = (mask.sum(1).cpu() - 2).clamp_min(0)
        draws = torch.rand(2, len(inner), generator=generator)
        kept = (inner * (1 + draws[0]) / 2).ceil().long()
        start = ((inner - kept + 1) * draws[1]).long()
        place = torch.arange(mask.shape[1]).expand(mask.shape)
        kept, start, end = kept[:, None], start[:, None], inner[:, None] + 1
        source = torch.where(place <= kept, place + start * (place > 0), torch.where(place == kept + 1, end, place))
        source = source.clamp_max(mask.shape[1] - 1).to(mask.device)
        cut = {name: tensor.gather(1, source) for name, tensor in self._beside(mask).items()}
        cut["attention_mask"] *= (place <= kept + 1).to(mask)
        return self.with_tensors(cut)

    def _beside(self, mask: Tensor) -> dict[str, Tensor]:
        """The tensors of the shape of a mask, without a decoder's texts, to which labels belong if there are any."""
        decoder = {name for name in self if name.startswith("decoder_")}
        others = decoder | {"labels"} if decoder else decoder
        return {name: self[name] for name in self if name not in others and self[name].shape == mask.shape}

    def to(self, device: torch.device) -> Examples:
        """Return the examples on a device."""
        return Examples({name: tensor.to(device) for name, tensor in self._tensors.items()}, self._rows)

    @cached_property
    def digest(self) -> str:
        """A digest of the names and values of all tensors; it does not depend on their device."""
        rows = {f"rows of {name}": rows for name, rows in self._rows.items()}
        return digest_of(sorted({**self._tensors, **rows}.items()))

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        return next(iter(self._tensors.values())).device


def _known_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The numbers of rows of the tensors that have several for an example, as far as the tensors tell."""
    texts, grids = tensors.get("input_ids"), tensors.get("image_grid_thw")
    if texts is None:
        return {}
    if len(texts) == 1:
        return {name: torch.tensor([len(tensor)]) for name, tensor in tensors.items() if len(tensor) != 1}
    if grids is None or len(grids) != len(texts):
        return {}
    return {"pixel_values": grids.prod(1).cpu()}


def _joined(tensors: list[Tensor], names: Iterable[str], name: str) -> Tensor:
    """Concatenate tensors (count, ...), padding texts to the same length and images to the same size and number."""
    shapes = {tensor.shape[1:] for tensor in tensors}
    if len(shapes) == 1:
        return torch.cat(tensors)
    alike = len({len(shape) for shape in shapes}) == 1
    text = alike and tensors[0].dim() == 2 and "attention_mask" in names
    images = alike and name in IMAGES and (SIZES & set(names) or len({shape[-3:] for shape in shapes}) == 1)
    if not text and not images:
        raise PermpruneError(
            f"the calibration batches have {name} of different shapes: pad them to one, or give an attention_mask"
        )
    target, filler = [max(sizes) for sizes in zip(*shapes, strict=True)], IGNORED if name == "labels" else 0
    missing = [[wanted - size for wanted, size in zip(target, tensor.shape[1:], strict=True)] for tensor in tensors]
    pads = [[end for size in reversed(sizes) for end in (0, size)] for sizes in missing]
    return torch.cat([F.pad(tensor, pad, value=filler) for tensor, pad in zip(tensors, pads, strict=True)])


def batches(examples: Examples, batch: int) -> list[Examples]:
    """Split the examples into batches of `batch`; padded texts are sorted by length and trimmed in each batch."""
    if examples.get("attention_mask") is None:
        return examples.split(batch)
    return [examples[positions].trimmed() for positions in by_length(examples, batch)]


def by_length(examples: Examples, batch: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Return batches of examples of similar length, as int64 indices (batch,); the last batch may be smaller.

    With a generator, the batches are random, and so is their order: `SORTED` of them are sorted by length together.
    """
    mask = examples.get("attention_mask")
    lengths = torch.zeros(len(examples)) if mask is None else mask.flatten(1).sum(1).cpu()
    if generator is None:
        return list(lengths.argsort(stable=True).split(batch))
    runs = torch.randperm(len(examples), generator=generator).split(SORTED * batch)
    sorted_batches = [one for run in runs for one in run[lengths[run].argsort(stable=True)].split(batch)]
    return [sorted_batches[i] for i in torch.randperm(len(sorted_batches), generator=generator).tolist()]


ExampleData = Examples | Mapping[str, Tensor] | Tensor | Iterable[Mapping[str, Tensor]]
"""The data that `Examples.of` accepts."""

Part = Literal["calibration", "evaluation"]
