"""What a run depends on, as data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from permprune.errors import PermpruneError
from permprune.options import MODES, Bytes, Count, Positive, Seed, nearest, require_fields

PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Settings:
    """What a run depends on; the same settings give the same permutations.

    `pattern`: "N:M", or "mixed" for a pattern of each layer's own (`mix`). `saliency`: magnitude, wanda, ria or obs.
    `mode`: "fold" (no run-time cost) or "gather" (every reader of the residual stream in its own order, one
    `index_select` each). `calibration`: a source (see `load_examples`), None for the default one, of which `samples`
    examples are drawn, or windows of `length` tokens: the first `measured` give the statistics, the next `held_out` the
    accept test, the rest the gradients; where each example has one label, `EXAMPLES_PER_WINDOW` count as one.
    `precision`: of activations: fp32, bf16, or auto for the faster. `memory`: bytes for the statistics of one
    calibration pass; `prune_to_folder` reads a model that needs more in all layer by layer. `minutes`: end the search
    after so long. `exclude`: globs of layers that stay dense. `update`: none, or sparsegpt, which changes the weights
    at the orders found, as far as the held-out examples like it (`update_network`). `batch`: calibration examples that
    pass through the model at a time. `recompute`: run each block again in the backward pass instead of keeping its
    activations. `shared`: the evaluation comes from the same images, speech or sentences, of which each gets half.
    `trust_remote_code`: run the code that comes with a checkpoint, where the model is read by name (`read_model`).
    Raises `PermpruneError` for numbers out of range and unknown names.
    """

    pattern: str = "2:4"
    saliency: str = "wanda"
    mode: str = "fold"
    calibration: str | None = None
    samples: Count = 192
    length: Count = 512
    measured: Count = 24
    held_out: Count = 8
    seed: Seed = 0
    precision: str = "auto"
    memory: Bytes | None = None
    minutes: Positive | None = None
    exclude: tuple[str, ...] = ()
    update: str = "none"
    batch: Count = 4
    recompute: bool = False
    shared: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        from permprune.pattern import parse_pattern  # these import torch, which the command line's help does without
        from permprune.saliency.registry import saliency
        from permprune.updates.registry import update

        require_fields(self)
        parse_pattern(self.pattern)
        saliency(self.saliency)
        update(self.update)
        if self.mode not in MODES or self.precision not in PRECISIONS:
            raise PermpruneError(
                f'mode "{self.mode}" with precision "{self.precision}": '
                f"choose a mode of {', '.join(MODES)} and a precision of {', '.join(PRECISIONS)}"
            )

    @classmethod
    def of(cls, **values: Any) -> Settings:
        """Settings by keywords. Raises `PermpruneError` for a keyword that is none, naming the nearest that is one."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise PermpruneError(f'there is no setting "{name}": {nearest(name, known)}')
        return cls(**values)

    def described(self, permute: str) -> dict[str, Any]:
        """The settings and the permuter's name for a record; methods of one's own by what they print as."""
        plain = (bool, int, float, str, tuple, type(None))
        values = {name: value if isinstance(value, plain) else str(value) for name, value in vars(self).items()}
        return {"permute": permute, **values}

    def shares(self, count: int, examples_per_window: int = 1) -> list[int]:
        """How many of `count` examples are for the statistics, the held-out loss and the gradients.

        `examples_per_window` of them count as one window. If there are too few, the proportions stay; the last share
        may be 0 or less where there are fewer than 3.
        """
        wanted = examples_per_window * (self.measured + self.held_out)
        share = min(1.0, count / (2 * wanted))
        measured, held_out = (max(1, int(share * examples_per_window * own)) for own in (self.measured, self.held_out))
        return [measured, held_out, count - measured - held_out]
