"""Examples: the inputs of a model, and labels, as named tensors with one row per example."""

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
"""The label of positions without a label, which losses ignore."""

SORTED = 50
"""Number of batches whose examples are sorted by length together."""


class Examples:
    """Tensors by the names of the model's arguments, all with the same first dimension; immutable.

    Text has "input_ids", int64 (count, length), and if it is padded "attention_mask" of the same shape, which is 0 for
    padding. Images have "pixel_values" (count, channels, height, width), and speech has "input_features" (count, bins,
    frames). "labels", if present, are one class per example, int64 (count,), or one per position, int64
    (count, length), with -100 for positions without a label. `len` returns the number of examples; slices and index
    tensors select examples. Raises `PermpruneError` if there are no tensors or their first dimensions differ.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        counts = {name: len(tensor) for name, tensor in tensors.items()}
        if not counts or len(set(counts.values())) > 1:
            given = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no tensors"
            raise PermpruneError(f"examples with {given}: give named tensors with the same first dimension")
        self._tensors = dict(tensors)

    @classmethod
    def of(cls, data: ExampleData, most: int | None = None) -> Examples:
        """Create examples from named tensors, token ids (count, length), or an iterable of batches of named tensors.

        Batches are read, for example from a `DataLoader`, until there are `most` examples. Texts of different lengths
        are padded at the end if the batches have an "attention_mask". Raises `PermpruneError` if a batch is not a dict
        of tensors, or if the names or shapes of the batches differ.
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
                    f"a calibration batch is {type(batch).__name__}: give dicts of tensors by the names of the "
                    "model's arguments"
                )
            found.append({name: tensor.cpu() for name, tensor in batch.items()})
            count += len(cls(batch))
            if most is not None and count >= most:
                break
        if not found:
            raise PermpruneError("the calibration has no batches: give an iterable that can be read again")
        if any(batch.keys() != found[0].keys() for batch in found):
            raise PermpruneError("the calibration batches have different tensors: give the same names in each")
        return cls({name: _joined([batch[name] for batch in found], found[0], name) for name in found[0]})[:most]

    @overload
    def __getitem__(self, at: str) -> Tensor: ...
    @overload
    def __getitem__(self, at: slice | Tensor) -> Examples: ...
    def __getitem__(self, at: str | slice | Tensor) -> Tensor | Examples:
        """Return the tensor of that name, or the examples at these positions (a slice, or int64 indices)."""
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
        """Return the names of the tensors; with this method, `**examples` passes the tensors as keyword arguments."""
        return list(self._tensors)

    def get(self, name: str) -> Tensor | None:
        """Return the tensor of that name; None if there is none."""
        return self._tensors.get(name)

    def split(self, sizes: int | list[int]) -> list[Examples]:
        """Split the examples, in order, into parts of `sizes` examples each, of which the last may be smaller.

        If `sizes` is a list, its entries are the sizes of the parts and add up to the number of examples.
        """
        names = self._tensors.keys()
        parts = zip(*(tensor.split(sizes) for tensor in self._tensors.values()), strict=True)
        return [Examples(dict(zip(names, part, strict=True))) for part in parts]

    def trimmed(self) -> Examples:
        """Remove the columns at the end that are padding in all texts.

        Images, speech, texts without an "attention_mask" and texts with a label per position are returned unchanged.
        """
        mask, labels = self.get("attention_mask"), self.get("labels")
        if mask is None or "input_ids" not in self or (labels is not None and labels.dim() > 1):
            return self
        longest = max(1, int((mask.any(0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).max()))
        cut = {name: tensor[:, :longest] for name, tensor in self._tensors.items() if tensor.shape == mask.shape}
        return Examples({**self._tensors, **cut})

    def to(self, device: torch.device) -> Examples:
        """Return the examples on a device."""
        return Examples({name: tensor.to(device) for name, tensor in self._tensors.items()})

    @cached_property
    def digest(self) -> str:
        """A digest of the names and values of all tensors; it does not depend on their device."""
        return digest_of(sorted(self._tensors.items()))

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        return next(iter(self._tensors.values())).device


def _joined(tensors: list[Tensor], names: Container[str], name: str) -> Tensor:
    """Concatenate tensors (count, ...), padding texts to the same length.

    Raises `PermpruneError` if the shapes differ and the tensors cannot be padded.
    """
    shapes = {tensor.shape[1:] for tensor in tensors}
    if len(shapes) == 1:
        return torch.cat(tensors)
    if "attention_mask" not in names or {len(shape) for shape in shapes} != {1}:
        raise PermpruneError(
            f"the calibration batches have {name} of different shapes: pad them to one, or give an attention_mask"
        )
    length, filler = max(shape[0] for shape in shapes), IGNORED if name == "labels" else 0
    return torch.cat([F.pad(tensor, (0, length - tensor.shape[1]), value=filler) for tensor in tensors])


def batches(examples: Examples, batch: int) -> list[Examples]:
    """Split the examples into batches of `batch`; padded texts are sorted by length and trimmed in each batch."""
    if examples.get("attention_mask") is None:
        return examples.split(batch)
    return [examples[at].trimmed() for at in by_length(examples, batch)]


def by_length(examples: Examples, batch: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Return batches of examples of similar length, as int64 indices (batch,); the last batch may be smaller.

    With a generator, the examples are shuffled, groups of `SORTED` batches are sorted by length, and the batches are
    shuffled.
    """
    mask = examples.get("attention_mask")
    lengths = torch.zeros(len(examples)) if mask is None else mask.flatten(1).sum(1).cpu()
    if generator is None:
        return list(lengths.argsort(stable=True).split(batch))
    runs = torch.randperm(len(examples), generator=generator).split(SORTED * batch)
    found = [own for run in runs for own in run[lengths[run].argsort(stable=True)].split(batch)]
    return [found[at] for at in torch.randperm(len(found), generator=generator).tolist()]


ExampleData = Examples | Mapping[str, Tensor] | Tensor | Iterable[Mapping[str, Tensor]]
"""The data that `Examples.of` accepts."""

Part = Literal["calibration", "evaluation"]
