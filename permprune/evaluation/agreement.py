"""Agreement of a model's outputs with the dense model's, and similarities of pairs of texts with scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.evaluation.metrics import correlations
from permprune.evaluation.result import (
    COSINE,
    FEATURE_ERROR,
    KL_DIVERGENCE,
    NEAREST,
    NEAREST_TEN,
    SIMILARITIES,
    TOP_1_AGREEMENT,
    Result,
    ratio_error,
    share,
)
from permprune.examples import Examples, batches
from permprune.losses.targets import Embedding, Predictions, Task, choose_task, embed_all
from permprune.models.forward import frozen
from permprune.models.generation import needs_decoder_inputs, with_decoder_inputs
from permprune.models.modality import pooling_of
from permprune.system import distributed
from permprune.system.device import compute_device
from permprune.system.progress import track

MOST = 4096
"""The number of texts whose neighbours and similarities are compared: their pairs are in memory."""


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
        if pooling := pooling_of(model):  # type: ignore[arg-type]
            embedded = [embed_all(model, examples, pooling, batch)]
            return DenseOutputs(examples, Embedding(pooling=pooling), embedded, batch)
        task = choose_task(model, examples, batch)
        parts = track(distributed.share(batches(examples, batch)), "running the dense model")
        return DenseOutputs(examples, task, [task(model, inputs).target() for inputs in parts], batch)


@torch.inference_mode()
def agreement(model: nn.Module, examples: Examples, dense: nn.Module | DenseOutputs, *, batch: int = 8) -> list[Result]:
    """Measure the share of predictions that equal the dense model's, and the mean KL divergence from it, in nats.

    Predictions are those of every example, or of every token that is not padding. For a model without a head, the
    result is the mean squared distance of the features, relative to their variance, and for a sentence encoder that of
    `embedding_agreement`. `dense` is the dense model, or its `dense_outputs` if both are the same module with other
    weights. Raises `PermpruneError` if no task fits the examples.
    """
    if not isinstance(dense, DenseOutputs):
        dense = dense_outputs(dense, examples, batch)
    examples, task, batch = dense.examples, dense.task, dense.batch
    if isinstance(task, Embedding):
        with frozen(model):
            return embedding_agreement(embed_all(model, examples, task.pooling, batch), dense.predictions[0])
    device, sums = compute_device(model), torch.zeros(3, dtype=torch.float64)
    with frozen(model):
        parts = track(distributed.share(batches(examples, batch)), "agreement")
        for inputs, expected in zip(parts, dense.predictions, strict=True):
            found = task(model, inputs.to(device))
            same = 0.0
            if isinstance(found, Predictions):
                same = float((found.logits.argmax(-1).cpu() == expected.argmax(-1)).sum())
            sums += torch.tensor([same, float(found.distance(expected)), found.terms], dtype=torch.float64)
    distributed.add_([sums])
    same, distance, count = sums.tolist()
    if variances := getattr(task, "variances", None):
        return [Result("imitation", FEATURE_ERROR, distance / count / len(variances), count=int(count))]
    return [
        share("imitation", TOP_1_AGREEMENT, right=same, count=count),
        Result("imitation", KL_DIVERGENCE, distance / count, count=int(count)),
    ]


def embedding_agreement(pruned: Tensor, dense: Tensor) -> list[Result]:
    """Compare embeddings with the dense model's of the same texts, both of length 1, fp32 (texts, channels).

    Returns the mean cosine similarity; the share of texts with the same nearest neighbour, and the share of their ten
    nearest that are the same, among at most `MOST` of the texts; and Spearman's correlation of all similarities.
    Raises `PermpruneError` if the numbers of channels differ.
    """
    if pruned.shape != dense.shape:
        raise PermpruneError(
            f"the dense model has embeddings of {dense.shape[1]} channels, the model of {pruned.shape[1]}: "
            "give the model that it was pruned from"
        )
    cosines = (pruned * dense).sum(1).double()
    count = len(pruned)
    terms = cosines, torch.ones_like(cosines)
    results = [Result("imitation", COSINE, float(cosines.mean()), count=count, stderr=ratio_error(*terms), terms=terms)]
    pruned, dense = pruned[:MOST], dense[:MOST]
    if len(pruned) < 3:
        return results
    similar, expected = (x @ x.T - 2 * torch.eye(len(x)) for x in (pruned, dense))
    same = similar.argmax(1) == expected.argmax(1)
    results.append(Result("imitation", NEAREST, float(same.double().mean()), count=len(pruned)))
    k = min(10, len(pruned) - 1)
    sets = [torch.zeros_like(x, dtype=torch.bool).scatter_(1, x.topk(k).indices, True) for x in (similar, expected)]
    shared = float((sets[0] & sets[1]).sum()) / (k * len(pruned))
    results.append(Result("imitation", NEAREST_TEN, shared, count=len(pruned)))
    pairs = torch.triu_indices(len(pruned), len(pruned), 1)
    ranks = stats.spearmanr(*(x[pairs[0], pairs[1]].numpy() for x in (similar, expected))).statistic
    return [*results, Result("imitation", SIMILARITIES, float(ranks), count=len(pruned))]


def pair_similarity(model: nn.Module, examples: Examples, pooling: str, metric: str | None, batch: int) -> list[Result]:
    """Measure how well the cosine similarities of pairs of texts follow their scores, by correlation.

    Examples 2 i and 2 i + 1 are a pair; both have its score as label. `metric` is "spearman" (the default) or
    "pearson". Raises `PermpruneError` for another.
    """
    if metric not in (None, "spearman", "pearson"):
        raise PermpruneError(f'the metric "{metric}" does not fit pairs of texts: choose spearman, or pearson')
    with frozen(model):
        values = embed_all(model, examples, pooling, batch)
    similarities = (values[::2] * values[1::2]).sum(1).double()
    return correlations("similarity", examples["labels"][::2].cpu().double(), similarities, first=metric or "spearman")
