"""Memory of the host from which a GPU copies by itself, in exactly the bytes that are needed."""

from __future__ import annotations

import mmap
import weakref

import torch
from torch import Tensor

from permprune.errors import PermpruneError


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
        raise PermpruneError("the system does not pin more memory of the host: free some, or give --offload disk")
    weakref.finalize(pages, runtime.cudaHostUnregister, values.data_ptr())
    return values
