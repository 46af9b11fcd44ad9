"""Random weights that hold a pattern."""

import torch
from torch import Tensor

from permprune.kernels.product.packed import PackedWeight
from permprune.pattern import Pattern


def sparse(rows: int, width: int, pattern: Pattern, seed: int = 0) -> Tensor:
    """Random fp32 (rows, width) with n non-zeros in every group of m."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    return weight * pattern.mask(torch.rand(rows, width, generator=generator))


def packed(rows: int, width: int, pattern: str = "2:4", dtype: torch.dtype = torch.float32) -> PackedWeight:
    found = Pattern.parse(pattern)
    return PackedWeight.pack(sparse(rows, width, found), found, dtype)
