"""Random division of a set into parts, in each of which members are matched."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def random_parts(count: int, largest: int, generator: torch.Generator) -> list[Int[Tensor, " members"]]:
    """Divide `count` members into as few parts as possible, at random, with at most `largest` members each.

    The sizes of the parts differ by at most 1, as far as they can. Returns the members of each part, int64, in
    ascending order. If one part is enough, nothing is drawn from the generator.
    """
    parts = part_count(count, largest)
    if parts == 1:
        return [torch.arange(count)]
    return [part.sort().values for part in torch.randperm(count, generator=generator).tensor_split(parts)]


def part_count(count: int, largest: int) -> int:
    """Return the number of parts into which `random_parts` divides `count` members."""
    return max(1, -(-count // largest))


def groups_in(channels: int, m: int) -> int:
    """Return the number of groups of `m` in a part of at most `channels` channels, which has at least two."""
    return max(2, channels // m)
