"""Shelves of tensors, which rest on the device that computes, in the memory of the host, or in a file."""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import tempfile
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.system.files import reported

Place = Literal["device", "host", "disk"]
"""Where tensors rest: on the device that computes, in the memory of the host, or on the disk."""

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their bytes."""

PLACED = 1 << 20
"""Elements that are spread at a time: their places are numbers of 8 bytes."""

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in the header of a safetensors file."""


class Computed(Mapping[str, Tensor]):
    """A mapping of names to tensors that are computed each time they are read."""

    def __init__(self, names: Collection[str], compute: Callable[[str], Tensor]) -> None:
        self._names, self._compute = names, compute

    def __getitem__(self, name: str) -> Tensor:
        return self._compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Room:
    """The bytes that are left for tensors on a device and in the memory of its host, of which shelves take leases.

    Of those on the device `reserved` ones are not for tensors at rest while blocks are updated (`without_reserved`).
    """

    def __init__(self, device: float = 0, host: float = math.inf, reserved: float = 0) -> None:
        self.limited, self._reserved = host < math.inf, reserved
        self.aside: list[weakref.ref[Shelf]] = []
        self._left: dict[Place, float] = {"device": device, "host": host}
        self._lock = threading.RLock()  # a lease may end while another one is taken

    def lease(self, size: int, places: Collection[Place] = ("device", "host")) -> Lease:
        """Take so many bytes at the first of these places that has them, else on the disk, until the lease is freed.

        Before the disk is taken in place of the host, what is put `aside` there moves to the disk.
        """
        with self._lock:
            while not (free := [place for place in places if self._left[place] >= size]):
                if "host" not in places or not self.aside:
                    break
                if (shelf := self.aside.pop()()) is not None:
                    shelf.move()
            lease = Lease(next(iter(free), "disk"))
            self._add(lease.place, -size)
        weakref.finalize(lease, self._add, lease.place, size)
        return lease

    @contextmanager
    def without_reserved(self) -> Iterator[None]:
        """A context in which the reserved bytes of the device are left to others, such as the update of a block."""
        self._add("device", -self._reserved)
        try:
            yield
        finally:
            self._add("device", self._reserved)

    def _add(self, place: Place, size: float) -> None:
        with self._lock:
            if place != "disk":
                self._left[place] += size


def picked(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return the elements that a mask keeps, (count,), as `tensor[mask]`; on a CPU NumPy is ten times as fast."""
    if not tensor.is_cpu:
        return tensor[mask]
    return torch.from_numpy(np.compress(_flat(mask), _flat(tensor))).view(tensor.dtype)


def spread(elements: Tensor, mask: Tensor) -> Tensor:
    """Undo `picked`, with zeros for the others; on a CPU NumPy takes half of the time of `masked_scatter_`."""
    tensor = elements.new_zeros(mask.shape)
    if not elements.is_cpu:
        return tensor.masked_scatter_(mask, elements)
    flat, kept, values, begin = _flat(tensor), _flat(mask), _flat(elements), 0
    for start in range(0, len(flat), PLACED):
        places = np.flatnonzero(kept[start : start + PLACED])
        flat[start : start + PLACED][places] = values[begin : begin + len(places)]
        begin += len(places)
    return tensor


def _flat(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor on the CPU by their bits, since NumPy has no bf16; bool stays bool."""
    if tensor.dtype != torch.bool:
        tensor = tensor.detach().contiguous().view(BITS[tensor.itemsize])
    return tensor.contiguous().view(-1).numpy()


@dataclass(frozen=True)
class Lease:
    """A place for a tensor, which is held as long as this object is."""

    place: Place


class Shelf(MutableMapping[str, Tensor]):
    """Tensors by name, which rest at a `place`, on the disk in a temporary file in `folder`.

    A tensor that is read is on the device from which it was put here. Unless it rests there, it is a copy, or on a CPU
    a mapping of the file, and is freed when it is not used any more: after a change in place it has to be put back, as
    `shelf[name] += 1` does. The file has no name, and ends with the shelf. With `masks`, bool and of the tensors'
    shapes, only the elements that they keep rest; the others are read as 0. With `room`, tensors of a device rest there
    while it has room, those of a shelf on the host then there, and only what is left on the disk. Raises
    `PermpruneError` if the disk is full.
    """

    def __init__(
        self,
        place: Place = "device",
        folder: Path | None = None,
        masks: Mapping[str, Tensor] | None = None,
        room: Room | None = None,
    ) -> None:
        self.place, self.folder, self._masks, self.room = place, folder, masks, Room() if room is None else room
        self._held: dict[str, _Held] = {}
        self._lent = defaultdict[str, Callable[[], Tensor | None]](lambda: lambda: None)
        self._file: _File | None = None
        self._lock = threading.Lock()  # several problems are solved at a time

    def another(self, masks: Mapping[str, Tensor] | None = None) -> Shelf:
        """An empty shelf at the same place; with `masks` only the elements that they keep are needed of its tensors.

        On the device all rest, since to pick them out would take longer.
        """
        return Shelf(self.place, self.folder, None if self.place == "device" else masks, self.room)

    def put_aside(self) -> None:
        """Let tensors that are seldom read from now on make room for others, on the device at once.

        If `room` limits the memory of the host, those there move to the disk when others need it, else at once.
        """
        if self.place == "device":
            return
        if self.place == "host" and self.room.limited:
            self.move("host")
            self.room.aside.append(weakref.ref(self))
            return
        self.place, self.room = "disk", Room()
        self.move()

    def move(self, *places: Place) -> None:
        """Move tensors that do not rest at these places there, or to the disk if they have no room."""
        for name, held in [*self._held.items()]:
            if held.start is None and (held.lease is None or held.lease.place not in places):
                moved = self._room_for(held.tensor, held.device, places)
                self._values(moved).copy_(held.tensor)
                self._held[name] = moved

    def resting(self, name: str) -> Tensor:
        """The tensor, or its kept elements, where it rests; of one on the disk a mapping of the file."""
        return self._values(self._held[name])

    def _values(self, held: _Held) -> Tensor:
        return held.tensor if held.start is None else self._opened().mapped(held)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.resting(name).to(self._held[name].device)
        if self._masks is not None:
            return spread(tensor, self._masks[name])
        self._lent[name] = weakref.ref(tensor)
        return tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if self._masks is not None:
            tensor = picked(tensor, self._masks[name])
        if self.place == "device" or (self.place == "host" and tensor.is_cpu):
            self._held[name] = _Held(tensor.device, tensor)
            return
        known = self._held.get(name)
        if known is None or (known.tensor.shape, known.tensor.dtype) != (tensor.shape, tensor.dtype):
            places: tuple[Place, ...] = ("device", "host") if self.place == "host" else ("device",)
            known = self._held[name] = self._room_for(tensor, tensor.device, places[tensor.is_cpu :])
        if known.start is None and known.tensor.device == tensor.device:
            self._held[name] = replace(known, tensor=tensor)
        elif not tensor.is_cpu or self._lent[name]() is not tensor:  # else a mapping, which was changed in place
            self.resting(name).copy_(tensor)

    def __delitem__(self, name: str) -> None:
        del self._held[name]

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def _room_for(self, tensor: Tensor, device: torch.device, places: Collection[Place]) -> _Held:
        """Room for a tensor of a device at one of these places or, if they have none, on the disk."""
        lease = self.room.lease(tensor.nbytes, places)
        if lease.place != "disk":
            return _Held(device, tensor if lease.place == "device" else empty_on_host(tensor, device), lease=lease)
        described = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        with self._lock:
            return _Held(device, described, self._opened().allocate(tensor.nbytes))

    def _opened(self) -> _File:
        if self._file is None:
            self._file = _File(self.folder)
        return self._file


@dataclass(frozen=True)
class _Held:
    """A tensor at rest, and the device from which it came; of one on the disk its shape, and its place in the file."""

    device: torch.device
    tensor: Tensor
    start: int | None = None
    lease: Lease | None = None


class _File:
    """A temporary file without a name, of which tensors are mapped."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self._end = folder or Path(tempfile.gettempdir()), 0
        with reported(self.folder):
            self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 (closed with the shelf)
        weakref.finalize(self, self._file.close)

    def allocate(self, size: int) -> int:
        """Take so many bytes, on pages of their own; returns the place of the first. Raises `PermpruneError`."""
        start = self._end
        self._end += mmap.ALLOCATIONGRANULARITY * math.ceil(size / mmap.ALLOCATIONGRANULARITY)
        with reported(self.folder):
            if size and hasattr(os, "posix_fallocate"):  # to write to a page that the disk lacks would kill the process
                os.posix_fallocate(self._file.fileno(), start, self._end - start)
            else:
                self._file.truncate(self._end)
        return start

    def mapped(self, held: _Held) -> Tensor:
        described = held.tensor
        if not described.numel():
            return torch.empty(described.shape, dtype=described.dtype)
        pages = mmap.mmap(self._file.fileno(), described.nbytes, offset=cast(int, held.start))
        return torch.frombuffer(pages, dtype=described.dtype).view(described.shape)


def empty_on_host(like: Tensor, device: torch.device) -> Tensor:
    """Return an empty tensor of this shape and type in the memory of the host, pinned if the device is a GPU.

    PyTorch would round its bytes up to a power of two, and keep them for others when the tensor is freed. Raises
    `PermpruneError` if the system does not pin so much.
    """
    if device.type != "cuda" or not like.numel():
        return torch.empty(like.shape, dtype=like.dtype)
    pages, runtime = mmap.mmap(-1, like.nbytes), torch.cuda.cudart()
    values = torch.frombuffer(pages, dtype=like.dtype).view(like.shape)
    if int(runtime.cudaHostRegister(values.data_ptr(), like.nbytes, 0)):
        raise PermpruneError("the system does not pin more memory of the host: free some, or give --set offload=disk")
    weakref.finalize(pages, runtime.cudaHostUnregister, values.data_ptr())
    return values


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    described: Mapping[str, Tensor] | None = None,
) -> None:
    """Write tensors of any device to a safetensors file, and hold one of them at a time.

    They are read from the mapping twice, unless tensors of the same shapes and types are given as `described`.
    """
    described = tensors if described is None else described
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    sizes, end = {name: described[name].dtype.itemsize for name in described}, 0
    names = sorted(sizes, key=lambda name: -sizes[name])  # so that all are aligned
    for name in names:
        tensor = described[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        del tensor
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def read_tensors(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, each read when it is accessed, and the metadata.

    Raises `SafetensorError` for a damaged file.
    """
    with safe_open(path, "pt") as file:
        names, metadata = list(file.keys()), file.metadata() or {}

    def read(name: str) -> Tensor:
        with safe_open(path, "pt") as opened:  # what was read of it is freed with the tensor
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    return Computed(names, read), metadata
