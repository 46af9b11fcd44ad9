"""The student of a fine-tuning: its head, its teacher, and the parameters that are trained."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from permprune.checkpoints.origin import Patterns
from permprune.checkpoints.source import OpenModel, open_model
from permprune.coupling.discovery import discover
from permprune.coupling.fold import fold_all
from permprune.data.labelled import read_labelled_text
from permprune.engine.pruned import compose_tables, folded_tables
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.losses.targets import Task
from permprune.models.forward import is_causal_lm, is_encoder_decoder, short_inputs
from permprune.models.layers import block_linears
from permprune.models.modality import kind_of
from permprune.training.heads import with_head
from permprune.training.weights import adapted, trained_weights
from permprune.training.zeros import KeptZeros

if TYPE_CHECKING:
    from permprune.jobs.finetune import FineTuning


@contextmanager
def parameters_to_train(
    model: PreTrainedModel, patterns: Patterns, options: FineTuning
) -> Iterator[dict[str, nn.Parameter]]:
    """A context in which pruned weights stay zero; it returns the parameters to train, by name."""
    if options.adapters is None:
        with KeptZeros(model, patterns):
            yield trained_weights(model, options.train)
        return
    layers = block_linears(model)
    names = {layer.name for layer in layers}
    unadapted = [name for name in patterns if name not in names]
    with KeptZeros(model, unadapted), adapted(model, layers, options.adapters, options.seed) as adapters:
        yield trained_weights(model, "norms") | adapters


def with_labels_head(model: PreTrainedModel, options: FineTuning) -> PreTrainedModel:
    """Return a text encoder with a head for the labels of the data, which is new if the model has none.

    A sentence encoder with a teacher, which learns embeddings, and any other model are returned unchanged, as is every
    model if `options.data` is None.
    """
    kind, writes = kind_of(model), is_causal_lm(model) or is_encoder_decoder(model)
    imitates = kind == "embeddings" and options.teacher is not None
    if kind not in ("text", "embeddings") or writes or imitates or options.data is None:
        return model
    classes = read_labelled_text(options.data, "calibration").classes()
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        return with_head(model, classes or ["score"])


def teacher_of(options: FineTuning, model: PreTrainedModel, examples: Examples, task: Task) -> OpenModel | None:
    """Return the teacher with its channels in the stored order of the pruned model; None if there is no teacher.

    One that is read holds weights that are stored in bf16 as they are, as long as the result is referenced. A teacher
    in memory is copied instead of changed. Raises `PermpruneError` if the shape of its outputs, or its channels, differ
    from those of the model.
    """
    if options.teacher is None:
        return None
    opened = open_model(options.teacher, task=options.task, trust_remote_code=options.trust_remote_code, narrow=True)
    teacher = opened.model
    first = examples[:1].trimmed()
    with torch.no_grad():
        student_shape, shape = (task(one, first.to(one.device)).target().shape for one in (model, teacher))
    if student_shape != shape:
        raise PermpruneError(
            f"{opened.name} has {shape[-1]} outputs but the model {student_shape[-1]}: give the dense model as teacher"
        )
    undone = {space: table.argsort() for space, table in folded_tables(teacher).items()}
    if tables := compose_tables(undone, folded_tables(model)):
        teacher = copy.deepcopy(teacher) if teacher is options.teacher else teacher
        with nullcontext() if opened.held is None else opened.held.as_stored():  # for the trace
            coupling = discover(teacher, short_inputs(teacher, examples.to(teacher.device)))
        try:
            fold_all(teacher, tables, coupling)
        except PermpruneError as error:
            raise PermpruneError(
                f"{opened.name} has other channels than the model: give the dense model as teacher"
            ) from error
    return dataclasses.replace(opened, model=teacher)
