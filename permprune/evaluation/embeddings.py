"""Metrics of sentence encoders: agreement with the dense model's embeddings, and similarities of pairs with scores."""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.evaluation.metrics import correlations
from permprune.evaluation.result import COSINE, NEAREST, NEAREST_TEN, SIMILARITIES, Result
from permprune.examples import Examples
from permprune.losses.embeddings import embed_all
from permprune.models.forward import frozen

MOST = 4096
"""The number of texts whose neighbours and similarities are compared: their pairs are in memory."""


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
    error = float(cosines.std() / count**0.5) if count > 1 else None
    results = [Result("imitation", COSINE, float(cosines.mean()), count=count, stderr=error)]
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
