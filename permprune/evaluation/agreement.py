"""Agreement of a model's outputs with the dense model's, for examples without labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from permprune.evaluation.embeddings import embedding_agreement
from permprune.evaluation.metrics import share
from permprune.evaluation.result import FEATURE_ERROR, KL_DIVERGENCE, TOP_1_AGREEMENT, Result
from permprune.examples import Examples
from permprune.losses.choice import choose_task
from permprune.losses.embeddings import Embedding, embed_all
from permprune.losses.targets import Predictions, Task
from permprune.models.forward import frozen
from permprune.models.generation import needs_decoder_inputs, with_decoder_inputs
from permprune.system import distributed
from permprune.system.device import compute_device
from permprune.system.progress import track


@dataclass(frozen=True)
class DenseOutputs:
    """A dense model's outputs for this process's batches of examples, on the CPU, with their task and batch size.

    The `examples` have an input for the model's decoder. Of a sentence encoder they are the embeddings of all examples.
    """

    examples: Examples
    task: Task
    predictions: list[Tensor]
    batch: int


@torch.inference_mode()
def dense_outputs(model: nn.Module, examples: Examples, batch: int = 8) -> DenseOutputs:
    """Compute a dense model's outputs for `agreement`; log-probabilities are stored in fp16.

    A decoder without text in the examples reads what the dense model generates, as in calibration.
    """
    if needs_decoder_inputs(model, examples):
        examples = with_decoder_inputs(model, examples)
    examples = examples.to(compute_device(model))
    with frozen(model):
        task = choose_task(model, examples, batch)
        if isinstance(task, Embedding):
            return DenseOutputs(examples, task, [embed_all(model, examples, task.pooling, batch)], batch)
        batches = track(distributed.share(examples.split(batch)), "running the dense model")
        return DenseOutputs(examples, task, [task(model, inputs).target() for inputs in batches], batch)


@torch.inference_mode()
def agreement(model: nn.Module, examples: Examples, dense: nn.Module | DenseOutputs, *, batch: int = 8) -> list[Result]:
    """Measure the share of predictions that equal the dense model's, and the mean KL divergence from it, in nats.

    Predictions are those of every example, or of every token that is not padding. For a model without a head, the
    result is the mean squared distance of the features, relative to their variance, and for a sentence encoder that of
    `embedding_agreement`. `dense` is the dense model, or its
    `dense_outputs` if both are the same module with other weights. Raises `PermpruneError` if no task fits the
    examples.
    """
    if not isinstance(dense, DenseOutputs):
        dense = dense_outputs(dense, examples, batch)
    if isinstance(dense.task, Embedding):
        with frozen(model):
            pruned = embed_all(model, dense.examples, dense.task.pooling, dense.batch)
        return embedding_agreement(pruned, dense.predictions[0])
    device = compute_device(model)
    same, distance, count = 0, 0.0, 0
    with frozen(model):
        parts = distributed.share(dense.examples.split(dense.batch))
        for inputs, expected in zip(track(parts, "agreement"), dense.predictions, strict=True):
            predictions = dense.task(model, inputs.to(device))
            distance, count = distance + float(predictions.distance(expected)), count + predictions.terms
            if isinstance(predictions, Predictions):
                same += int((predictions.logits.argmax(-1).cpu() == expected.argmax(-1)).sum())
    same_total, distance, total = distributed.total(same, distance, count)
    if variances := getattr(dense.task, "variances", None):
        return [Result("imitation", FEATURE_ERROR, distance / total / len(variances), count=int(total))]
    return [
        share("imitation", TOP_1_AGREEMENT, right=same_total, count=total),
        Result("imitation", KL_DIVERGENCE, distance / total, count=int(total)),
    ]
