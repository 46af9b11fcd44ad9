"""Efforts: how many rounds of search and steps of training a run makes, and on how many windows, from its work alone.

An effort is a number of floating-point operations. Divided by those of the model for one window they give the rounds
and the steps, so that the same seed gives the same model on every machine; the time follows, and is forecast.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from permprune.config import PruneConfig
from permprune.errors import PermpruneError, first_line
from permprune.forecasts.costs import TRIED
from permprune.forecasts.passes import example_pass
from permprune.models.layers import block_linears
from permprune.models.modality import EXAMPLES_PER_WINDOW, kind_of
from permprune.models.shallow import repetitions
from permprune.permuters.trust_region import Newton
from permprune.system.progress import log
from permprune.updates.methods import ADMM

DEFAULT = "minutes"
"""The effort of `prune` if neither an effort nor a permuter is given."""

ROUNDS = 1, 16
"""The fewest and the most rounds: further ones gain little (docs/results/ablations.md)."""

STEPS = 16, 2000
"""The fewest and the most steps of training; its learning rate rises in a tenth of them."""

RATES = {"embeddings": 5e-3, "images": 5e-4}
"""The learning rate of kinds of model whose training gains by another than the default (docs/results/ablations.md)."""

BLOCKS_FROM = 150
"""The steps of training of text from which half of their operations go into training each block before; with fewer that
gains little (docs/results/ablations.md)."""

START = "ria"
"""The orders that a compensation is made for: as good as better orders of the search (docs/results/ablations.md)."""

LARGE_WINDOWS = 768
"""The most windows of images or speech that are drawn: they take up to a thousand times the memory of text."""


@dataclass(frozen=True)
class Effort:
    """The `operations` of a run, and whether weights that are kept change.

    If they do, a layer-wise update chooses the masks (see `compensation`), and what is left of the operations goes into
    training, of text first block by block if it is much (`BLOCKS_FROM`): after such an update, rounds of search for the
    order gain nothing (docs/results/ablations.md).
    """

    operations: float
    trains: bool


EFFORTS = {
    "order": Effort(6e13, trains=False),
    "minutes": Effort(6e13, trains=True),
    "hour": Effort(3.6e14, trains=True),
}
"""The efforts by name (`config.EFFORTS`)."""


def resolve(model: PreTrainedModel, config: PruneConfig, size: tuple[int, int] | None = None) -> PruneConfig:
    """Return the config of a run on a model, with the permuter and the windows that its effort sets.

    A config with a permuter is returned as it is; one without an effort has the `DEFAULT`. The model may be on the meta
    device: only shapes count, with images of this `size` (`processed_size`). Raises `PermpruneError` if both are given.
    """
    config.require_one_choice()
    if "permute" in config.given:
        return config
    name = config.effort or DEFAULT
    effort, method, kind = EFFORTS[name], Newton(), kind_of(model)
    windows = effort.operations / (_operations(model, config, size) * EXAMPLES_PER_WINDOW[kind])
    rounds, steps, start, training = 0, 0, "", ""
    if effort.trains:
        products = sum(2.0 * layer.shape.numel() * layer.shape[1] for layer in block_linears(model))
        compensation = 8 * method.examples + products * ADMM().iterations * windows / effort.operations
        a_step = 4 * method.step_examples  # with the dense model's
        steps = _within(STEPS, (windows - compensation) / a_step)
        rate, blocks = f":rate={RATES[kind]:g}" if kind in RATES else "", ""
        if kind == "text" and steps >= BLOCKS_FROM:
            steps //= 2
            blocks = f":block_steps={2 * steps}"  # a step of all blocks takes half as many passes
        start, training = f":start={START}", f":compensate=true{blocks}:train_steps={steps}{rate}"
    else:
        rounds = _within(ROUNDS, windows / (3 * method.examples + TRIED * config.held_out))  # passes of a window
    needed = max(rounds * method.examples, steps * method.step_examples)
    if kind in ("images", "speech"):
        needed = min(needed, LARGE_WINDOWS)
    samples = config.measured + config.held_out + needed
    if "samples" in config.given:
        samples = min(samples, config.samples)
    resolved = config.replace(effort=name, permute=f"{method.name}{start}:rounds={rounds}{training}", samples=samples)
    log.info("effort %s: %s on %d windows", name, resolved.permute, resolved.samples)
    return resolved


def _operations(model: PreTrainedModel, config: PruneConfig, size: tuple[int, int] | None) -> float:
    """The operations of a pass over an example; of a model that cannot be run without numbers, those of its weights."""
    failure = ""
    for lists in (repetitions(model), ()):  # a model's own code may need all of its blocks
        try:
            return example_pass(model, config, size=size, lists=lists).operations
        except PermpruneError:
            raise
        except Exception as error:  # a model's own code can raise any type
            failure = first_line(error)
    log.warning("the effort is that of a text of %d tokens: %s", config.length, failure)
    return 2.0 * config.length * sum(weight.numel() for weight in model.parameters() if weight.dim() > 1)


def _within(limits: tuple[int, int], number: float) -> int:
    least, most = limits
    return max(least, min(most, round(number)))
