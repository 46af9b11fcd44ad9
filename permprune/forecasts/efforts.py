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
from permprune.recipe import WINDOWS as UPDATED
from permprune.registry import describe
from permprune.system.progress import log
from permprune.training.train import WINDOWS as STEP
from permprune.training.train import Training
from permprune.updates.methods import ADMM, NoUpdate

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

ORDER, UPDATE = "ria", "admm"
"""The order and the update before a training: better orders gain nothing then (docs/results/ablations.md)."""

LARGE_WINDOWS = 768
"""The most windows of images or speech that are drawn: they take up to a thousand times the memory of text."""


@dataclass(frozen=True)
class Effort:
    """A named recipe: the `operations` of a run, and whether weights that are kept change.

    If they do, a layer-wise update at one-shot orders chooses the masks, and what is left of the operations goes into
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
    """Return the config of a run on a model, with the recipe and the windows that its effort sets.

    Without an effort, what is missing of a recipe is completed, and one without any part has the `DEFAULT` effort. The
    model may be on the meta device: only shapes count, with images of this `size` (`processed_size`). Raises
    `PermpruneError` if both an effort and parts of a recipe are given.
    """
    config.require_one_choice()
    if config.given_parts:
        return config.completed()
    name = config.effort or DEFAULT
    effort, kind = EFFORTS[name], kind_of(model)
    windows = effort.operations / (_operations(model, config, size) * EXAMPLES_PER_WINDOW[kind])
    if effort.trains:
        train = _training(model, effort, windows)
        order, change, needed = ORDER, UPDATE, train.steps * STEP
    else:
        rounds = _within(ROUNDS, windows / (3 * Newton().examples + TRIED * config.held_out))  # passes of a window
        train, change, needed = Training(), NoUpdate.name, rounds * Newton().examples
        order = describe(Newton(rounds=rounds))
    if kind in ("images", "speech"):
        needed = min(needed, LARGE_WINDOWS)
    samples = config.measured + config.held_out + needed
    if config.samples is not None:
        samples = min(samples, config.samples)
    resolved = config.replace(effort=name, order=order, update=change, train=describe(train), samples=samples)
    log.info("effort %s: %s; %d windows", name, "; ".join(resolved.recipe.lines), samples)
    return resolved


def _training(model: PreTrainedModel, effort: Effort, windows: float) -> Training:
    """The training for the operations of so many passes of a window, of which the update takes some."""
    kind = kind_of(model)
    products = sum(2.0 * layer.shape.numel() * layer.shape[1] for layer in block_linears(model))
    update = 2 * UPDATED + products * ADMM().iterations * windows / effort.operations
    steps = _within(STEPS, (windows - update) / (4 * STEP))  # each with the dense model's pass
    blocks = kind == "text" and steps >= BLOCKS_FROM
    if blocks:
        steps //= 2  # the steps of the blocks take as long
    return Training(steps=steps, blocks=blocks, rate=RATES.get(kind, Training.rate))


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
