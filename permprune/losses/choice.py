"""The choice of the task, by the names of the examples' tensors and by what the model returns."""

from __future__ import annotations

from torch import nn

from permprune.errors import PermpruneError
from permprune.examples import IGNORED, Examples
from permprune.losses.embeddings import Embedding
from permprune.losses.targets import Imitation, Task, labelled, next_token, scored
from permprune.models.forward import is_causal_lm, is_ctc
from permprune.models.modality import pooling_of
from permprune.system.device import compute_device


def choose_task(model: nn.Module, examples: Examples, batch: int) -> Task:
    """Choose the task for examples; the dense model may run on `batch` of them at a time.

    A sentence encoder reproduces the dense model's embeddings. For other models labels, if there are any, are targets:
    classes or scores. Otherwise a causal language model predicts the next token of text, and any other model reproduces
    the dense model's outputs (`Imitation`), as do models of CTC, whose transcripts give no frame a label. Raises
    `PermpruneError` if the model and the examples do not fit any task.
    """
    labels = examples.get("labels")
    if pooling := pooling_of(model):  # type: ignore[arg-type]
        return Embedding.of_pooling(pooling, model, examples, batch)
    if labels is None or is_ctc(model):
        return next_token if is_causal_lm(model) and "input_ids" in examples else Imitation.of(model, examples, batch)
    if labels.is_floating_point():
        scored(model, examples[:1].to(compute_device(model)))
        return scored
    if not labels.ne(IGNORED).any():
        raise PermpruneError(f"all labels of the measured examples are {IGNORED}: give some that count, or none")
    return next_token if is_causal_lm(model) and labels.dim() == 2 else labelled
