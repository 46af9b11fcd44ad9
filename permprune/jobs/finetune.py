"""The job of `permprune finetune`: train a model on a task, or what pruning left of one, and write it to a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from permprune.checkpoints.io import read_model
from permprune.checkpoints.origin import origin_of
from permprune.checkpoints.patterns import Patterns, held_patterns, recorded_patterns, require_patterns
from permprune.checkpoints.probe import check_outputs
from permprune.checkpoints.record import Optimised
from permprune.checkpoints.schema import decode
from permprune.coupling.discovery import discover
from permprune.coupling.fold import fold_all
from permprune.data.labelled import read_labelled_text
from permprune.data.load import load_examples
from permprune.errors import PermpruneError
from permprune.evaluation.dispatch import evaluate_model, knows_right
from permprune.evaluation.probe import with_head
from permprune.evaluation.result import Result
from permprune.evaluation.size import weight_bytes
from permprune.examples import Examples
from permprune.jobs.trials import BATCH
from permprune.losses.objective import Objective
from permprune.losses.targets import Task, choose_task
from permprune.models.forward import decodes, short_inputs, writes
from permprune.models.layers import require_changeable
from permprune.models.modality import BATCH_MULTIPLIER, kind_of
from permprune.models.processors import Processor
from permprune.options import Count, NonNegative, Positive, Seed, require_fields
from permprune.pruning.folder import require_probe, write_model
from permprune.system import distributed
from permprune.system.digests import WEIGHTS, model_digests, versions
from permprune.system.files import WorkFolder, atomic_folder, require_space
from permprune.system.out_of_memory import memory_reported
from permprune.system.search_state import Checkpoint
from permprune.training.loop import Trainer, Training
from permprune.training.weights import masked, trained_weights

HELD_OUT, MOST_HELD_OUT = 0.1, 1000
"""The share of the data on which epochs are measured where there is no data apart for it, and the most examples."""

EVERYTHING = 1_000_000
"""Examples to ask for where all are wanted."""

STEPS, MOST_EPOCHS = 300, 20
"""Small data is passed over more often, until there are so many steps, or epochs."""

RATES = {"all": 5e-5, "norms": 1e-3, "head": 1e-3}
SMALL, SMALL_RATE = 50_000_000, 1e-4
"""Learning rates by what is trained, and that of all weights of a model with fewer than so many."""


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """What to train on, and how.

    `data` is a source as those of `load_examples`, of which `rows` examples are drawn, or all; of a text windows, by
    default 256. `dev` is the source to measure each epoch on; None holds out a tenth of the data, at most 1000
    examples. `length` in tokens: of windows 512 by default, and at most that of other texts, 128. `train` is one of
    `TRAINED`. With `teacher`, the name of the dense model, the loss is the KL divergence from what it says, of scores
    the squared distance, in place of the labels, which it mostly knows by heart, but beside the tokens of a text; and
    `hidden` times the distance of the blocks' outputs (`Objective`). Dropout is off then, and the best epoch that of
    the least loss on `dev`, otherwise that of the best metric. `metric` as that of `Evaluation`. `lr` is by default
    that of `RATES`, or `SMALL_RATE`; `batch` examples make a step, by default 32, of windows of text 4; there are 3
    epochs by default, and more of small data. `trust_remote_code` is as that of `read_model`, of the teacher too.
    Raises `PermpruneError` for numbers out of range.
    """

    data: str | None
    dev: str | None = None
    train: str = "all"
    teacher: str | None = None
    hidden: NonNegative = 0.0
    metric: str | None = None
    epochs: Count | None = None
    lr: Positive | None = None
    batch: Count | None = None
    length: Count | None = None
    rows: Count | None = None
    seed: Seed = Training.seed
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require_fields(self)

    def training(self, model: PreTrainedModel, count: int) -> Training:
        """That of a model on so many examples."""
        batch = self.batch or BATCH * BATCH_MULTIPLIER[kind_of(model)]
        epochs = self.epochs or min(max(Training.epochs, round(STEPS * batch / count)), MOST_EPOCHS)
        small = self.train == "all" and model.num_parameters() < SMALL
        return Training(epochs, self.lr or (SMALL_RATE if small else RATES[self.train]), batch, seed=self.seed)

    def examples(self, model: PreTrainedModel, processor: Processor | None) -> tuple[Examples, Examples]:
        """Those to train on and those to measure on."""
        text = kind_of(model) == "text"
        length = self.length or (512 if text else 128)
        rows = self.rows or (256 if text else EVERYTHING)
        shown = load_examples(self.data, model, processor, "calibration", rows, length, self.seed)
        if self.dev is not None:
            return shown, load_examples(self.dev, model, processor, "evaluation", EVERYTHING, length, 0)
        held_out = min(max(1, round(HELD_OUT * len(shown))), MOST_HELD_OUT)
        if len(shown) <= held_out:
            raise PermpruneError(f"{len(shown)} example to train on: give more data")
        dev, rest = shown.split([held_out, len(shown) - held_out])
        return rest, dev


@memory_reported()
def finetune(
    name: str,
    out: Path,
    options: FineTuning,
    resume: bool = False,
    announce: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Train a model, by name or folder, and write it to `out` as it was found: with its record if it was pruned.

    A model without a head is given one for the labels of the data. A layer whose weights hold an N:M pattern keeps its
    zeros, whether a record names it or not. While it runs the state lies in `out`.partial; with `resume` the training
    goes on from there. Returns what was measured: "metric", "before" and "after", its standard error "stderr", over
    "count" of "unit", that of the teacher ("dense", None without one), and the "curve" of the epochs. `announce` is
    given that before the folder is written. Raises `PermpruneError`.
    """
    if distributed.world() > 1:
        raise PermpruneError("finetune runs as one process: start it without torchrun")
    with WorkFolder(out).held("finetune", resume) as work:
        return _finetune(name, options, work, announce)


def _finetune(
    name: str, options: FineTuning, work: WorkFolder, announce: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    model, processor, stored = read_model(name, trust_remote_code=options.trust_remote_code)
    require_changeable(model)
    origin = origin_of(model)
    if origin.record is None:
        model = _with_head(model, options)
    else:
        check_outputs(model, require_probe(origin), name, stored=stored)
    patterns = _patterns(model)
    examples, held_out = options.examples(model, processor)
    batch = BATCH * BATCH_MULTIPLIER[kind_of(model)]
    if not knows_right(model, examples):
        raise PermpruneError("nothing says what is right: give data with labels")
    task = choose_task(model, examples, batch)
    teacher = None
    if options.teacher is not None:
        teacher = _teacher(options.teacher, model, examples, task, options.trust_remote_code)
    objective = Objective()
    if teacher is not None:  # it knows its labels by heart, but no text
        objective = Objective(float(kind_of(model) == "text"), divergence=1.0, distillation=options.hidden)

    def measure(shown: PreTrainedModel = model) -> Result:
        return evaluate_model(shown, held_out, None, None, batch, options.metric)[0]

    identity = {
        "model": name,
        **dataclasses.asdict(options),
        **model_digests(model, model.state_dict().items()),
        "training examples": examples.digest,
        "held-out examples": held_out.digest,
        "teacher weights": None if teacher is None else model_digests(teacher, teacher.state_dict().items())[WEIGHTS],
        **versions(),
    }
    weights = trained_weights(model, options.train)
    state_bytes = 32 * sum(weight.numel() for weight in weights.values())  # now, best and two moments, twice
    require_space(work.out, weight_bytes(model, stored) + state_bytes)
    trainer = Trainer(
        model,
        weights,
        task=task,
        loss=objective,
        measure=measure,
        training=options.training(model, len(examples)),
        checkpoint=Checkpoint(work.path, identity),
        teacher=teacher,
        held_out=None if teacher is None else held_out,
    )
    with masked(model, patterns):
        curve = trainer.fit(examples)
    require_patterns(model, patterns)
    result = measure()
    found = {
        **dataclasses.asdict(options),
        **dataclasses.asdict(trainer.training),
        "examples": len(examples),
        "metric": result.metric,
        "dense": None if teacher is None else measure(teacher).value,
        "before": curve[0].value,
        "after": result.value,
        "stderr": result.stderr,
        "count": result.count,
        "unit": result.unit,
        "seconds": curve[-1].seconds,
        "curve": [dataclasses.asdict(epoch) for epoch in curve],
    }
    announce(found)
    with atomic_folder(work.out, work.scratch, "free space, then repeat with --resume") as folder:
        write_model(model, processor, folder, optimised=decode(Optimised, found))
    return found


def _with_head(model: PreTrainedModel, options: FineTuning) -> PreTrainedModel:
    """An encoder with a new head for the labels of the data; any other model as it is."""
    if kind_of(model) != "text" or writes(model) or decodes(model) or options.data is None:
        return model
    classes = read_labelled_text(options.data, "calibration").classes()
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        return with_head(model, classes or ["score"])


def _patterns(model: PreTrainedModel) -> Patterns:
    """The patterns that the model's layers hold and are to keep: by their weights, whatever a record may say.

    Raises `PermpruneError` when a layer does not hold the pattern in its record.
    """
    record, held = origin_of(model).record, held_patterns(model)
    recorded = recorded_patterns(model, record.layers) if record else {}
    require_patterns(model, recorded)
    return recorded | held


@torch.no_grad()
def _teacher(
    name: str, model: PreTrainedModel, examples: Examples, task: Task, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The dense model, its channels in the order in which those of the pruned one are stored.

    Raises `PermpruneError` where its outputs are of another kind than the model's.
    """
    teacher, _, _ = read_model(name, trust_remote_code=trust_remote_code)
    part = examples[:1].trimmed()
    own, dense = (task(one, part.to(one.device)).kept().shape for one in (model, teacher))
    if own != dense:
        raise PermpruneError(f"{name} gives {dense[-1]} numbers where the model gives {own[-1]}: give its dense model")
    record = origin_of(model).record
    if tables := {space: torch.tensor(table) for space, table in (record.permutations if record else {}).items()}:
        fold_all(teacher, tables, discover(teacher, short_inputs(teacher, examples.to(teacher.device))))
    return teacher
