"""List the channel spaces of a model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from permprune.checkpoints.source import ModelSource, open_model
from permprune.coupling.discovery import discover
from permprune.coupling.verify import verify_space
from permprune.models.dummy_inputs import example_inputs, read_example
from permprune.models.processors import Processor
from permprune.system.out_of_memory import memory_reported


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectedSpace:
    """A channel space: `size` channels in each of `blocks` blocks, which `members` parameters run along.

    `readers` of these are the inputs of linears. A "frozen" space cannot move, for the `reason` given. `difference` is
    the largest one of the outputs after a random permutation of the space; None where none was tried.
    """

    name: str
    size: int
    blocks: int
    freedom: Literal["free", "blocks", "frozen"]
    reason: str
    members: int
    readers: int
    difference: float | None = None


@memory_reported()
def inspect(
    model: ModelSource,
    processor: Processor | None = None,
    *,
    example: Mapping[str, Tensor] | Path | None = None,
    verify: bool = False,
    trust_remote_code: bool = False,
) -> list[InspectedSpace]:
    """Which channels of a model may be reordered, and how much must move with them.

    `model` is a name, a folder, or a model in memory, which stays as it is. It is traced on `example`, its inputs by
    name or a .safetensors or .npz file of them; made up if absent, with the `processor`'s size of images where the
    config has none. With `verify` each space that can move is proved on a random order, in float64.
    `trust_remote_code` is as that of `read_model`. Raises `PermpruneError`.
    """
    opened = open_model(model, processor, trust_remote_code=trust_remote_code)
    network = opened.model
    if verify:
        network = copy.deepcopy(network) if network is model else network
        network.double()
    batch = _example(example, network, opened.processor)
    found = []
    for space in discover(network, batch).spaces:
        moved = verify and space.freedom != "frozen"
        found.append(
            InspectedSpace(
                name=space.name,
                size=space.size,
                blocks=space.blocks,
                freedom=space.freedom,
                reason=space.reason,
                members=len(space.members),
                readers=len(space.readers),
                difference=verify_space(network, space, batch) if moved else None,
            )
        )
    return found


def _example(
    given: Mapping[str, Tensor] | Path | None, model: PreTrainedModel, processor: Processor | None
) -> dict[str, Tensor]:
    if given is None:
        return example_inputs(model, processor)
    return read_example(given, model) if isinstance(given, Path) else dict(given)
