"""The job of `permprune finetune`: fine-tune a dense or pruned model on a task and write it to a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from permprune.checkpoints.source import ModelSource, OpenModel, name_of, open_model
from permprune.errors import PermpruneError
from permprune.evaluation.result import Result, require_label_metric
from permprune.losses.objective import Objective
from permprune.models.modality import evaluation_batch, kind_of, pooling_asked
from permprune.options import PACKED, Count, NonNegative, Positive, Seed, require_choice, require_fields
from permprune.system.failures import failures_reported
from permprune.system.files import WorkFolder, atomic_folder, require_space
from permprune.system.imports import on_first_use
from permprune.system.progress import MEASURE, READ, TRAIN, WRITE, stage, stages

with on_first_use(globals()):
    from transformers import PreTrainedModel

    from permprune.checkpoints.origin import origin_of, require_patterns
    from permprune.checkpoints.probe import check_outputs
    from permprune.checkpoints.record import Epoch, Optimised
    from permprune.checkpoints.schema import decode
    from permprune.data.load import load_examples
    from permprune.data.overlap import overlap, warn_of_overlap
    from permprune.engine.measuring import transcriber
    from permprune.evaluation.agreement import dense_outputs
    from permprune.evaluation.dispatch import evaluate_model, has_targets
    from permprune.evaluation.size import weight_bytes
    from permprune.examples import Examples
    from permprune.inference.pack import packed_type
    from permprune.jobs.packing import pack_folder
    from permprune.jobs.student import parameters_to_train, teacher_of, with_labels_head
    from permprune.kernels.product.layout import require_packable
    from permprune.losses.targets import Imitation, Task, choose_task
    from permprune.models.forward import is_causal_lm, is_ctc
    from permprune.models.layers import block_linears, require_changeable
    from permprune.models.processors import Processor
    from permprune.pattern import Pattern
    from permprune.pruning.folder import require_probe, write_model
    from permprune.system import digests, distributed
    from permprune.system.search_state import Checkpoint
    from permprune.training.loop import Trainer, Training
    from permprune.training.weights import weight_scale
    from permprune.training.zeros import patterns_of

HELD_OUT, MOST_HELD_OUT = 0.1, 1000
"""The share of the data that is held out to measure each epoch if `dev` is None, and the maximum number of examples."""

EVERYTHING = 1_000_000
"""The number of examples to request in order to get all."""

STEPS, MOST_EPOCHS = 300, 20
"""By default, small data are trained on for more epochs: until there are `STEPS` steps, but at most `MOST_EPOCHS`."""

RATES = {"all": 5e-5, "norms": 1e-3, "head": 1e-3}
SMALL, SMALL_RATE = 50_000_000, 1e-4
"""Default learning rates by `FineTuning.train`; `SMALL_RATE` is that of "all" for fewer than `SMALL` parameters."""

TAUGHT_RATE = 2e-3
"""The default learning rate of all weights of a language model that has a teacher, relative to the size of its weights
(docs/results/ablations.md)."""

ADAPTERS_RATE = 1e-3
"""The default learning rate with adapters."""


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """The options of fine-tuning. Raises `PermpruneError` for numbers out of range."""

    data: str | None = None
    """The data to train on: labelled sentences or images, text or answers, in a file or folder, or a data set id; by
    default the text or the images of the zoo."""

    _: dataclasses.KW_ONLY

    dev: str | None = None
    """The data to measure each epoch on; by default a tenth of the training data, at most 1000 examples."""

    train: str = "all"
    """The weights to train: all, norms (norms, biases and the head) or head."""

    adapters: Count | None = None
    """Train linear layers through adapters (LoRA) of this rank, merged at the end, which needs less memory; by default
    every weight is trained by itself.

    This takes `train` "all". Norms, biases and the head are trained as they are, and embeddings are not. Pruned weights
    stay zero."""

    teacher: ModelSource | None = None
    """The dense model whose outputs replace the labels; a language model learns from its text as well.

    It is given by name or in memory. The loss is then the KL divergence from its outputs (for regression, the squared
    distance), for language models added to the loss of the tokens. Dropout is off, and the best epoch is the one with
    the smallest loss on `dev` instead of the best metric."""

    hidden: NonNegative | None = None
    """The weight of the distance between the blocks' outputs and the teacher's, relative to their length; by default 0
    for text that is predicted token by token, 4 for embeddings, else 20 (`Objective.hidden_states`)."""

    metric: str | None = None
    """The metric for labels: accuracy, matthews, f1, pearson or spearman; by default accuracy for classes, pearson for
    scores."""

    epochs: Count | None = None
    """Passes over the data, of which the best is kept; by default 3, up to 20 for small data."""

    lr: Positive | None = None
    """The peak learning rate; by default 5e-5, 1e-4 below 50 million parameters, 0.002 times the root mean square of
    the weights for a language model with a teacher, 1e-3 for norms, head and adapters."""

    batch: Count | None = None
    """Examples in a step; by default 32, or 4 windows of text."""

    length: Count | None = None
    """Tokens in an example; by default at most 128, or 512 for windows of text."""

    pack: str | None = None
    """Write packed weights as fp32, bf16, fp16, int8 or int4 (see `permprune pack`); by default with zeros."""

    rows: Count | None = None
    """Examples to draw from the data; by default all, or 256 windows of text."""

    seed: Seed = 0
    """Seed of all random numbers: the same one gives the same weights."""

    task: str | None = None
    """What the model and its teacher are for, if their files do not say: embedding, with the pooling as in
    embedding:pooling=cls."""

    trust_remote_code: bool = False
    """Run the Python code that comes with the model or its teacher, if they need any."""

    def __post_init__(self) -> None:
        require_fields(self)
        require_label_metric(self.metric)
        pooling_asked(self.task)
        require_choice("train", self.train, RATES)
        if self.pack is not None:
            require_choice("pack", self.pack, PACKED)
        if self.hidden is not None and self.teacher is None:
            raise PermpruneError("--hidden weighs the distance to a teacher, and there is none: name a --teacher")
        if self.adapters is not None and self.train != "all":
            raise PermpruneError(f"--adapters trains linear layers, --train {self.train} does not: give one of the two")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, with the name of the teacher in place of the model."""
        return {**vars(self), "teacher": None if self.teacher is None else name_of(self.teacher)}

    def training(self, model: PreTrainedModel, count: int) -> Training:
        """Return the settings of the training loop for a model and `count` training examples."""
        batch = self.batch or evaluation_batch(model)
        epochs = self.epochs or min(max(Training.epochs, round(STEPS * batch / count)), MOST_EPOCHS)
        return Training(epochs, self.lr or self._rate(model), batch, seed=self.seed)

    def _rate(self, model: PreTrainedModel) -> float:
        """The default learning rate."""
        if self.adapters is not None:
            return ADAPTERS_RATE
        if self.train == "all" and self.teacher is not None and is_causal_lm(model):
            return TAUGHT_RATE * weight_scale(block_linears(model))
        small = self.train == "all" and model.num_parameters() < SMALL
        return SMALL_RATE if small else RATES[self.train]

    def examples(self, model: PreTrainedModel, processor: Processor | None) -> tuple[Examples, Examples]:
        """Load the data; returns the training examples and the held-out ones.

        Raises `PermpruneError` if the data cannot be read or are too few to hold out a part.
        """
        text = kind_of(model) == "text"
        rows, length = self.rows or (256 if text else EVERYTHING), self.length or (512 if text else 128)
        load = partial(load_examples, model=model, processor=processor, length=length)
        train = load(self.data, part="calibration", count=rows, seed=self.seed)
        if self.dev is not None:
            return train, load(self.dev, part="evaluation", count=EVERYTHING, seed=0)
        held_out = min(max(1, round(HELD_OUT * len(train))), MOST_HELD_OUT)
        if len(train) <= held_out:
            raise PermpruneError(f"{len(train)} example to train on: give more data")
        dev, train = train.split([held_out, len(train) - held_out])
        return train, dev


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuned:
    """The result of fine-tuning.

    `result` is the metric of the fine-tuned `model` on the held-out examples, `before` its value before training, and
    `dense` the teacher's value (None without a teacher). `curve` has one entry per epoch, after one for the model
    before training. `examples` is the number of training examples.
    """

    model: PreTrainedModel = dataclasses.field(repr=False)
    options: FineTuning
    training: Training
    examples: int
    result: Result
    before: float
    dense: float | None
    curve: list[Epoch]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values, as in the entry "optimised" of a record."""
        return {
            **self.options.to_json(),
            **dataclasses.asdict(self.training),
            "examples": self.examples,
            "metric": self.result.metric.name,
            "dense": self.dense,
            "before": self.before,
            "after": self.result.value,
            "stderr": self.result.stderr,
            "count": self.result.count,
            "unit": self.result.unit,
            "seconds": self.curve[-1].seconds,
            "curve": [dataclasses.asdict(epoch) for epoch in self.curve],
        }


@failures_reported()
@stages(READ, TRAIN, MEASURE, WRITE)
def finetune(
    model: ModelSource,
    out: str | Path,
    options: FineTuning,
    *,
    processor: Processor | None = None,
    resume: bool = False,
    announce: Callable[[FineTuned], None] = lambda result: None,
) -> FineTuned:
    """Fine-tune a model and write it to the folder `out`; a pruned model keeps its record.

    `model` is a name, a folder, or a model in memory with its `processor`, which is trained in place. A text encoder
    without a head and without a record gets a new head for the labels of the data. A layer whose weights satisfy an N:M
    pattern keeps its zeros, whether or not it is in a record. The state of an unfinished run is kept in `out`.partial;
    with `resume` training continues from it, given the same model. `announce` is called with the result before the
    folder is written. Raises `PermpruneError`.
    """
    if distributed.world() > 1:
        raise PermpruneError("finetune runs as one process: start it without torchrun")
    if options.teacher is not None and options.teacher is model:
        raise PermpruneError("the teacher is the model to be trained: give a copy of the dense model")
    with WorkFolder(Path(out)).held("finetune", resume) as work:
        opened = open_model(model, processor, task=options.task, trust_remote_code=options.trust_remote_code)
        require_changeable(opened.model)
        if opened.model is not model and (origin := origin_of(opened.model)).record:  # it was read from a folder
            check_outputs(opened.model, require_probe(origin), opened.name)
        return _finetune(opened, options, work, announce)


def _finetune(
    opened: OpenModel, options: FineTuning, work: WorkFolder, announce: Callable[[FineTuned], None]
) -> FineTuned:
    model = _model_to_train(opened, options)
    patterns = patterns_of(model)
    examples, held_out = options.examples(model, opened.processor)
    if options.dev is not None:
        warn_of_overlap(overlap([examples], held_out), "training")
    task = _task(model, examples, options)
    taught = teacher_of(options, model, examples, task)
    teacher = None if taught is None else taught.model  # `taught` holds its weights
    measure = _meter(model, opened.processor, held_out, options, teacher)
    identity = _identity(opened.name, model, options, teacher)
    identity |= {"training examples": examples.digest, "held-out examples": held_out.digest}
    with parameters_to_train(model, patterns, options) as weights:
        # Best weights, weights and two moments in fp32; the old state is kept until the new one is written.
        state = 28 * sum(weight.numel() for weight in weights.values())
        require_space(work.out, weight_bytes(model, opened.stored) + state)
        trainer = Trainer(
            model=model,
            weights=weights,
            task=task,
            loss=_objective(model, options, task, teacher),
            measure=partial(measure, model),
            training=options.training(model, len(examples)),
            checkpoint=Checkpoint(work.path, identity),
            teacher=teacher,
            held_out=None if teacher is None else held_out,
        )
        stage(TRAIN)
        curve = trainer.fit(examples)
    stage(MEASURE)
    require_patterns(model, patterns)
    result = FineTuned(
        model=model,
        options=options,
        training=trainer.training,
        examples=len(examples),
        result=measure(model),
        before=curve[0].value,
        dense=None if teacher is None else measure(teacher).value,
        curve=curve,
    )
    announce(result)
    stage(WRITE)
    _write(result, opened.processor, work)
    return result


def _model_to_train(opened: OpenModel, options: FineTuning) -> PreTrainedModel:
    """The model, with a head for the labels if it was not pruned. Raises `PermpruneError` if it cannot be packed."""
    record = origin_of(opened.model).record
    if record is None:
        if options.pack is not None:
            raise PermpruneError(
                f"{opened.name} has no record of permprune, so that it cannot be packed: prune it first"
            )
        return with_labels_head(opened.model, options)
    if options.pack is not None:
        for layer in record.layers:
            require_packable(Pattern.parse(layer.pattern), packed_type(options.pack))
    return opened.model


def _task(model: PreTrainedModel, examples: Examples, options: FineTuning) -> Task:
    """What the model is trained to predict. Raises `PermpruneError` without labels, or the teacher that it needs."""
    imitates = kind_of(model) == "embeddings" or is_ctc(model)
    if not has_targets(model, examples) and not imitates:
        raise PermpruneError("the data have no labels: give data with labels")
    task = choose_task(model, examples, evaluation_batch(model))
    if isinstance(task, Imitation) and options.teacher is None:
        raise PermpruneError(f"a {type(model).__name__} learns from a dense model's outputs alone: name a --teacher")
    return task


def _objective(model: PreTrainedModel, options: FineTuning, task: Task, teacher: PreTrainedModel | None) -> Objective:
    """The loss: that of the task, or a teacher's outputs in place of labels, but not of the tokens of text."""
    objective = Objective()
    if teacher is None:
        return objective
    objective = dataclasses.replace(objective.for_training(task), task=float(kind_of(model) == "text"))
    return objective if options.hidden is None else dataclasses.replace(objective, hidden_states=options.hidden)


def _meter(
    model: PreTrainedModel,
    processor: Processor | None,
    held_out: Examples,
    options: FineTuning,
    teacher: PreTrainedModel | None,
) -> Callable[[PreTrainedModel], Result]:
    """The function that measures a model on held-out examples, against the dense one if they have no labels."""
    batch = evaluation_batch(model)
    dense = None if has_targets(model, held_out) else dense_outputs(teacher or model, held_out, batch)
    tokenizer = transcriber(model, processor) if is_ctc(model) else None

    def measure(measured: PreTrainedModel) -> Result:
        return evaluate_model(measured, held_out, tokenizer, dense=dense, batch=batch, metric=options.metric)[0]

    return measure


def _identity(
    name: str, model: PreTrainedModel, options: FineTuning, teacher: PreTrainedModel | None
) -> dict[str, Any]:
    """What the states of a training depend on, beside its examples."""
    taught = None if teacher is None else digests.model_digests(teacher, teacher.state_dict().items())
    return {
        "model": name,
        **options.to_json(),
        "pack": None,  # training does not depend on it
        **digests.model_digests(model, model.state_dict().items()),
        "teacher weights": taught and taught[digests.WEIGHTS],
        **digests.versions(),
    }


def _write(result: FineTuned, processor: Processor | None, work: WorkFolder) -> None:
    """Write the output folder; to pack, write the trained model to the work folder first."""
    pack, optimised = result.options.pack, decode(Optimised, result.to_json())
    out = work.out if pack is None else work.scratch / "trained"
    with atomic_folder(out, work.scratch, "free space, then repeat with --resume") as folder:
        write_model(result.model, processor, folder, optimised=optimised, bench=None)
    if pack is not None:
        pack_folder(out, work.out, dtype=pack, trust_remote_code=result.options.trust_remote_code).warn()
