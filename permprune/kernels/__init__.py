"""Products with packed N:M weights: native kernels for the processor at hand, and the same in PyTorch."""

from permprune.kernels.linear import packed_linear
from permprune.kernels.packed import PackedWeight

__all__ = ["PackedWeight", "packed_linear"]
