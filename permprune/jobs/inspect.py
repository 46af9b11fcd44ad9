"""The job of `permprune inspect`: list the channel spaces of a model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from permprune.checkpoints.source import ModelSource, open_model
from permprune.coupling.discovery import discover
from permprune.coupling.fold import verify_space
from permprune.models.dummy_inputs import example_inputs
from permprune.models.processors import Processor
from permprune.system.failures import failures_reported


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectedSpace:
    """A channel space: channels that have to be permuted together.

    The space has `size` channels in each of `blocks` blocks. `members` is the number of parameters that have the space
    as a dimension, and `readers` the number of those for which it is the input dimension of a linear layer. A "frozen"
    space cannot be permuted, for the given `reason`. `difference` is the largest absolute difference of the model's
    outputs after a random permutation of the space; None if none was tried.
    """

    name: str
    size: int
    blocks: int
    freedom: Literal["free", "blocks", "frozen"]
    reason: str
    members: int
    readers: int
    difference: float | None = None


@failures_reported()
def inspect(
    model: ModelSource,
    processor: Processor | None = None,
    *,
    example: Mapping[str, Tensor] | None = None,
    verify: bool = False,
    trust_remote_code: bool = False,
) -> list[InspectedSpace]:
    """Return the channel spaces of a model: which channels can be permuted, and which parameters they share.

    `model` is a name, a folder, or a model in memory, which is not changed. It is traced on `example`: its inputs by
    name. By default inputs are generated; the size of images is that of the config or else of the `processor`. With
    `verify`, each space that can be permuted is tested with a random permutation in float64. `trust_remote_code` is as
    in `read_model`. Raises `PermpruneError`.
    """
    opened = open_model(model, processor, trust_remote_code=trust_remote_code)
    network = opened.model
    if verify:
        network = copy.deepcopy(network) if network is model else network
        network.double()
    batch = example_inputs(network, opened.processor) if example is None else dict(example)
    return [
        InspectedSpace(
            name=space.name,
            size=space.size,
            blocks=space.blocks,
            freedom=space.freedom,
            reason=space.reason,
            members=len(space.members),
            readers=len(space.readers),
            difference=verify_space(network, space, batch) if verify and space.freedom != "frozen" else None,
        )
        for space in discover(network, batch).spaces
    ]
