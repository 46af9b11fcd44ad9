"""The settings of a run, as data."""

from __future__ import annotations

import dataclasses
import math
import os
import reprlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from permprune.budget.asked import CANDIDATES, KEPT, frame_of, parse_candidates, require_budget
from permprune.errors import PermpruneError
from permprune.options import (
    HEADS,
    MODES,
    PACKED,
    ROUNDED,
    Bytes,
    Count,
    Length,
    Positive,
    Seed,
    Share,
    parse_bytes,
    replace_fields,
    require_choice,
    require_fields,
)
from permprune.pattern import MIXED, Pattern
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    from permprune.models.modality import pooling_asked
    from permprune.permuters.base import Permuter
    from permprune.permuters.registry import permuter
    from permprune.recipe import Recipe
    from permprune.registry import describe, label_of
    from permprune.saliency.metrics import Saliency, saliency
    from permprune.training.train import Training, training
    from permprune.updates.base import Update
    from permprune.updates.methods import update

PRECISIONS = ("auto", "fp32", "bf16")

PLACES = ("none", "host", "disk")
"""Where what is not used may be (`permprune.engine.sharded`)."""

EFFORTS = ("order", "minutes", "hour")
"""How much work a run may do (`permprune.forecasts.efforts`)."""

PARTS: dict[str, Any] = {"order": "newton", "update": "none", "train": "none"}
"""The parts of a recipe, with their values without an effort."""

SAMPLES = 192
"""The windows to calibrate on without an effort."""

MIX_FIELDS = ("candidates", "keep", "bytes", "max_loss", "packed", "packed_head")
"""The fields of a mix of patterns."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """The settings of a run: the same model, data and config give the same permutations.

    Methods are names ("newton", "newton:rounds=6") or objects (`Newton(rounds=6)`). Raises `PermpruneError` for numbers
    out of range and unknown names.
    """

    pattern: str = "2:4"
    """N:M keeps N of every M consecutive weights; "mixed" gives each layer a pattern of its own, within a budget."""

    candidates: tuple[str, ...] = CANDIDATES
    """The patterns that the layers of a mix may have, separated by commas, by default dense,7:8,6:8,5:8,4:8,3:8,2:8."""

    keep: Share | None = None
    """The budget of a mix: the share of the weights of pruned layers that it keeps, by default 0.5."""

    bytes: Positive | None = None
    """The budget of a mix: the size of the packed model, such as 90MB, or as a share of its size in bf16, such as 0.5.

    In Python it is a number of bytes, or a share, which is at most 1."""

    max_loss: Positive | None = None
    """The budget of a mix: what the model may lose by the measure of the evaluation, such as 1%.

    In Python it is a share, such as 0.01. The fewest weights that keep to it are searched, in several runs; one half of
    the evaluation data is for that, and the other half for the result."""

    saliency: str | Saliency = "wanda"
    """The score of each weight: magnitude, wanda, ria or obs."""

    effort: str | None = None
    """The recipe by name: order (a long search, no weight changes), minutes (an order, an update and a training of the
    weights that are kept; the default unless a part of the recipe is given) or hour (about six times as much).

    It sets `order`, `update` and `train` by the size of the model, and how many of the `samples` are used."""

    order: str | Permuter | None = None
    """The search for an order of channels: none, random, ria, cp, permllm, reconstruction, learned-paper, learned or
    newton, with options after the name, such as newton:rounds=6; by default newton without an effort.

    `compare` takes a list of methods in place of this one."""

    update: str | Update | None = None
    """The update of the weights that are kept, which compensates for the others: none, sparsegpt or admm; by default
    none without an effort.

    It chooses masks of its own at the orders found, and is kept if it lowers the loss on the held-out examples."""

    train: str | Training | None = None
    """The training of the weights that are kept, as options such as steps=60:blocks=true, or none, which is the default
    without an effort.

    It is kept if it lowers the loss on the held-out examples."""

    mode: str = "fold"
    """How orders are stored: fold writes them into the weights, at no cost at run time; with gather every layer that
    reads the residual stream has its own order, which loses less, at the cost of one `index_select` each."""

    calibration: str | Sequence[str] | None = None
    """The data to calibrate on: text, answers, sentences, images or speech in a file or folder, or a data set id; by
    default the text or the images of the zoo.

    Several sources (a list) are mixed: each gives an equal share of the windows, or all it has, evenly spread."""

    samples: Count | None = None
    """Windows of text to calibrate on, by default 192; an effort takes as many as it needs, or fewer if they are given.
    32 sentences, or 8 images or texts to embed, count as one."""

    length: Length = 512
    """Tokens in a window of text."""

    measured: Count = 24
    """Windows for the statistics (the first of those drawn)."""

    held_out: Count = 8
    """Windows on which searches accept or reject a step (the next ones); the rest is for gradients."""

    batch: Count = 2
    """Windows in a batch with gradients; fewer need less memory.

    A batch without gradients, which needs less memory, has twice as many."""

    recompute: bool = False
    """Recompute the activations of each block in the backward pass instead of storing them: slower, but less memory."""

    precision: str = "auto"
    """The data type of activations: fp32, bf16, or auto for the faster of the two."""

    memory: Bytes | None = None
    """The limit of the memory for tensors, such as 8GiB: settings are chosen that fit, to `offload` if nothing else.

    In Python it is a number of bytes. It limits a run of `prune_to_folder`, and elsewhere the statistics of one
    calibration pass."""

    offload: str = "none"
    """Where the weights of blocks that do not run, gradients and other large tensors are while they are not used: none
    (where they are used), host (for a GPU) or disk. Slower, less memory, the same result.

    With host:40GiB a run takes at most so much of the host, and files for what is left; what `memory` leaves free on a
    GPU, these tensors take first. With `memory` it is chosen if nothing else fits. It is for runs of `prune_to_folder`
    that read the model."""

    shard: bool | None = None
    """Whether the processes that torchrun starts divide the rows of the weights among them, or each hold the whole
    model, as they do by default if it fits in memory.

    Only those of `prune_to_folder` can divide them."""

    minutes: Positive | None = None
    """The time limit of search and training, in minutes, or none. If it ends them, the result depends on the speed of
    the machine."""

    seed: Seed = 0
    """Seed of all random numbers: the same one gives the same orders."""

    exclude: tuple[str, ...] = ()
    """Globs of the names of layers that are not pruned, such as "*.layers.0.*"."""

    packed: str = "bf16"
    """The type of the packed values that `bytes` counts; set by `prune_to_folder`."""

    packed_head: str | None = None
    """The type of the packed embedding and head, in the same way."""

    shared: bool = False
    """Whether the evaluation uses the same source: each then gets half of its images, speech or sentences
    (`Evaluation.beside` sets it)."""

    task: str | None = None
    """What the model is for, if its files do not say: embedding, with the pooling as in embedding:pooling=cls.

    It applies to a model that is read by name (`read_model`), as does `trust_remote_code`."""

    trust_remote_code: bool = False
    """Run the Python code that comes with a model, if it needs any."""

    def __post_init__(self) -> None:
        if self.effort is not None:
            require_choice("effort", self.effort, EFFORTS)
        require_fields(self)
        require_budget(self.pattern, self.candidates, keep=self.keep, bytes=self.bytes, max_loss=self.max_loss)
        self.parsed_pattern, self.sources, self.recipe  # noqa: B018 - raise
        saliency(self.saliency)
        pooling_asked(self.task)
        require_choice("mode", self.mode, MODES)
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("offload", self.place, PLACES)
        if self.offload != self.place and (self.place != "host" or math.isinf(self.host_limit)):
            raise PermpruneError(f'offload is "{self.offload}": only the host has a limit, such as host:40GiB')

    @cached_property
    def parsed_pattern(self) -> Pattern:
        """The pattern as N and M; for "mixed" that for whose groups orders are searched (`frame_of`)."""
        if self.pattern == MIXED:
            return frame_of(parse_candidates(self.candidates), KEPT if self.keep is None else self.keep)
        return Pattern.parse(self.pattern)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe; parts that are not given have their values without an effort."""
        order, change, train = (PARTS[name] if (given := getattr(self, name)) is None else given for name in PARTS)
        return Recipe(permuter(order), update(change), training(train))

    @property
    def place(self) -> str:
        """Where what is not used rests: one of `PLACES`."""
        return self.offload.partition(":")[0]

    @property
    def host_limit(self) -> float:
        """The bytes of memory that a run which offloads to the host takes there; infinite without a limit."""
        limit = self.offload.partition(":")[2]
        return parse_bytes(limit) if limit else math.inf

    @property
    def rounded(self) -> bool:
        """Whether the packed weights of any checkpoint are rounded."""
        return self.packed in ROUNDED or self.packed_head is not None

    @cached_property
    def sources(self) -> tuple[str | None, ...]:
        """The sources of the calibration data; None stands for the default data."""
        return _sources(self.calibration)

    @property
    def given_parts(self) -> list[str]:
        """The parts of the recipe that are given."""
        return [name for name in PARTS if getattr(self, name) is not None]

    def require_one_choice(self) -> None:
        """Raise `PermpruneError` if both an effort and parts of a recipe are given."""
        if self.effort is not None and (parts := self.given_parts):
            raise PermpruneError(
                f"effort {self.effort} sets order, update and training: leave out {' and '.join(parts)}, or the effort"
            )

    def completed(self) -> PruneConfig:
        """Return the config with values in place of what would be left to an effort.

        Raises `PermpruneError` if it has one, which only `prune` resolves.
        """
        if self.effort is not None and not self.given_parts:
            raise PermpruneError(f"effort {self.effort} sets the recipe of prune alone: leave it out")
        missing = {name: value for name, value in PARTS.items() if getattr(self, name) is None}
        return self.replace(**missing, samples=SAMPLES if self.samples is None else self.samples)

    def require_no_limit(self, what: str) -> None:
        """Raise `PermpruneError` if the budget is a loss, for which `what` has no data."""
        if self.max_loss is not None:
            raise PermpruneError(f"{what} measures no loss to limit: give keep or bytes, or use permprune prune --data")

    def packed_as(self, pack: str | None, head: str | None) -> PruneConfig:
        """Return the config of a run that writes its weights packed, with this head, unless `pack` is None.

        Raises `PermpruneError`.
        """
        if pack is None:
            if head is not None:
                raise PermpruneError(f"head is {head}, which is for packed weights: give pack too, such as int8")
            return self
        require_choice("pack", pack, PACKED)
        if head is not None:
            require_choice("head", head, HEADS)
        return self.replace(packed=pack, packed_head=head)

    def reads(self, source: str) -> bool:
        """Whether this is a source of the calibration data, however its path is written."""
        return _resolved(source) in [_resolved(known) for known in self.sources if known is not None]

    def replace(self, **changes: Any) -> PruneConfig:
        """Return a copy with other values. Raises `PermpruneError` for an unknown field, with the closest known one."""
        return replace_fields(self, changes, "there is no setting")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values: names as given, objects as the names that describe them (`label_of`).

        The recipe comes first; the fields of a mix are left out if there is one pattern.
        """
        left_out = () if self.pattern == MIXED else MIX_FIELDS
        fields = [field.name for field in dataclasses.fields(self) if field.name not in left_out]
        plain = {name: getattr(self, name) for name in (*PARTS, *fields)}
        described = {name: label_of(plain[name]) for name in (*PARTS, "saliency") if plain[name] is not None}
        sources = self.sources[0] if len(self.sources) == 1 else self.sources
        return {**plain, **described, "calibration": sources}

    def identity(self) -> dict[str, Any]:
        """Return the fields that are compared before a run is resumed.

        They are those of `to_json`, but names of the saliency and the update that mean the same are equal.
        """
        return {
            **self.to_json(),
            "saliency": describe(saliency(self.saliency)),
            "update": describe(self.recipe.update),
        }

    def shares(self, count: int, examples_per_window: int = 1) -> list[int]:
        """Return how many of `count` examples are for the statistics, the held-out loss and the gradients.

        `examples_per_window` examples count as one window. If there are too few, the first two shares are reduced in
        proportion so that about half remains for gradients. Raises `PermpruneError` if there are fewer than 3 examples.
        """
        if count < 3:
            raise PermpruneError(
                f"the calibration has {count} examples, but needs at least 3: "
                "give more data or --samples, or for text a smaller --length"
            )
        wanted = examples_per_window * (self.measured + self.held_out)
        share = min(1.0, count / (2 * wanted))
        windows = self.measured, self.held_out
        measured, held_out = (max(1, int(share * examples_per_window * number)) for number in windows)
        return [measured, held_out, count - measured - held_out]


def _sources(given: object) -> tuple[str | None, ...]:
    """Return the sources of calibration data. Raises `PermpruneError` for what are none, and for one named twice."""
    if given is None or isinstance(given, str):
        return (given,)
    sources = tuple(given) if isinstance(given, Sequence) else ()
    if not sources or not all(isinstance(source, str) for source in sources):
        raise PermpruneError(f"calibration is {reprlib.repr(given)}: give a file, a folder or a data set id, or a list")
    resolved = [_resolved(source) for source in sources]
    if twice := next((source for i, source in enumerate(sources) if resolved[i] in resolved[:i]), None):
        raise PermpruneError(f"calibration names {twice} twice: give it once")
    return sources


def _resolved(source: str) -> str:
    """A source with the absolute path, without links, of the file or folder that it names, if it names one."""
    name = source if os.path.exists(source) else source.partition("@")[0].partition(":")[0]
    return os.path.realpath(name) + source[len(name) :] if os.path.exists(name) else source
