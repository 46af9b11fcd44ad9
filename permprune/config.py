"""What a run depends on, as data."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from permprune.errors import PermpruneError
from permprune.options import MODES, Bytes, Count, Positive, Seed, nearest, require_fields

if TYPE_CHECKING:
    from permprune.permuters.base import Permuter
    from permprune.saliency.base import Saliency
    from permprune.updates.base import Update
else:  # their modules import torch, which the command line's help does without
    Permuter = Saliency = Update = object

PRECISIONS = ("auto", "fp32", "bf16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """What a run depends on: the same model, data and config give the same permutations.

    Methods are named ("newton", "newton:rounds=6") or given as objects (`Newton(rounds=6)`). Raises `PermpruneError`
    for numbers out of range and unknown names.
    """

    pattern: str = "2:4"
    """N:M, as in "2:4": N of every M consecutive weights stay; or "mixed": each layer has a pattern of its own."""

    saliency: str | Saliency = "wanda"
    """The score of each weight: magnitude, wanda, ria or obs."""

    permute: str | Permuter = "newton"
    """The search for an order of channels: none, random, ria, cp, permllm, reconstruction, learned-paper, learned or
    newton. `compare` and `sweep` take a list of methods in place of this one."""

    mode: str = "fold"
    """How orders are stored: "fold" writes them into the weights, which costs nothing at run time; with "gather" every
    layer that reads the residual stream has an order of its own, for one `index_select` each."""

    update: str | Update = "none"
    """What is done to the weights that stay: "none", or "sparsegpt", which updates them at the orders found, as far as
    that lowers the loss on the held-out examples."""

    calibration: str | None = None
    """The calibration data: a file, a folder or a data set id; None for the default data of the model's kind."""

    samples: Count = 192
    """Windows of text to draw from the calibration data; of images and sentences more examples count as one window."""

    length: Count = 512
    """Tokens in a window."""

    measured: Count = 24
    """Windows that give the statistics (the first of those drawn)."""

    held_out: Count = 8
    """Windows on which searches accept or refuse a step (the next ones); the rest is for gradients."""

    batch: Count = 4
    """Windows that pass through the model at a time."""

    recompute: bool = False
    """Run each block again in the backward pass instead of keeping its activations: slower, and takes less memory."""

    precision: str = "auto"
    """The type of activations: "fp32", "bf16", or "auto" for the faster of the two."""

    memory: Bytes | None = None
    """A bound in bytes on the statistics of one calibration pass; `prune_to_folder` reads a model that needs more in
    all from disk, layer by layer."""

    minutes: Positive | None = None
    """End the search after so long. The result then depends on the machine's speed."""

    seed: Seed = 0
    """Of all random numbers."""

    exclude: tuple[str, ...] = ()
    """Globs of layers that stay dense, such as "*.layers.0.*"."""

    shared: bool = False
    """Whether the evaluation draws from the same images, speech or sentences, of which each then gets half
    (`Evaluation.beside` sets it)."""

    trust_remote_code: bool = False
    """Run the Python code that comes with a checkpoint, where the model is read by name (`read_model`)."""

    def __post_init__(self) -> None:
        from permprune.pattern import parse_pattern  # these import torch, which the command line's help does without
        from permprune.permuters.registry import permuter
        from permprune.saliency.registry import saliency
        from permprune.updates.registry import update

        require_fields(self)
        parse_pattern(self.pattern)
        saliency(self.saliency)
        permuter(self.permute)
        update(self.update)
        if self.mode not in MODES or self.precision not in PRECISIONS:
            raise PermpruneError(
                f'mode "{self.mode}" with precision "{self.precision}": '
                f"choose a mode of {', '.join(MODES)} and a precision of {', '.join(PRECISIONS)}"
            )

    def replace(self, **changes: Any) -> PruneConfig:
        """A copy with other values. Raises `PermpruneError` for an unknown field, naming the nearest that exists."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise PermpruneError(f'there is no setting "{name}": {nearest(name, known)}')
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The fields for a record: names as they were given, objects described in the language of names."""
        from permprune.registry import label_of

        described = {name: label_of(getattr(self, name)) for name in ("permute", "saliency", "update")}
        return {"permute": described["permute"], **vars(self), **described}

    def identity(self) -> dict[str, Any]:
        """The fields for a state that a run goes on from: two names of one method are the same."""
        from permprune.registry import describe
        from permprune.saliency.registry import saliency
        from permprune.updates.registry import update

        return {
            **self.to_json(),
            "saliency": describe(saliency(self.saliency)),
            "update": describe(update(self.update)),
        }

    def shares(self, count: int, examples_per_window: int = 1) -> list[int]:
        """How many of `count` examples are for the statistics, the held-out loss and the gradients.

        `examples_per_window` of them count as one window. If there are too few, the proportions stay; the last share
        may be 0 or less where there are fewer than 3.
        """
        wanted = examples_per_window * (self.measured + self.held_out)
        share = min(1.0, count / (2 * wanted))
        measured, held_out = (max(1, int(share * examples_per_window * own)) for own in (self.measured, self.held_out))
        return [measured, held_out, count - measured - held_out]
