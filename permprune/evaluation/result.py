"""The results of evaluations: values of metrics."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

from permprune.errors import PermpruneError
from permprune.options import require_choice

if TYPE_CHECKING:
    from torch import Tensor


class NotFinite(PermpruneError):
    """Raised if a measured value is not finite."""


@dataclass(frozen=True)
class Metric:
    """A metric: its name in tables and files, and whether higher values are better."""

    name: str
    higher_is_better: bool

    def __str__(self) -> str:
        return self.name

    def cost(self, value: float) -> float:
        """Return a value so that lower is better: negated if higher is."""
        return -value if self.higher_is_better else value


PERPLEXITY = Metric("perplexity", higher_is_better=False)
EXACT_MATCH = Metric("exact match", higher_is_better=True)
TOP_1_ACCURACY = Metric("top-1 accuracy", higher_is_better=True)
TOP_1_AGREEMENT = Metric("top-1 agreement", higher_is_better=True)
KL_DIVERGENCE = Metric("KL divergence", higher_is_better=False)
FEATURE_ERROR = Metric("feature error", higher_is_better=False)
COSINE = Metric("cosine similarity", higher_is_better=True)
NEAREST = Metric("nearest neighbour agreement", higher_is_better=True)
NEAREST_TEN = Metric("ten nearest neighbours agreement", higher_is_better=True)
SIMILARITIES = Metric("Spearman correlation of similarities", higher_is_better=True)
WORD_ERROR_RATE = Metric("word error rate", higher_is_better=False)
MATTHEWS = Metric("Matthews correlation", higher_is_better=True)
F1 = Metric("F1", higher_is_better=True)
PEARSON = Metric("Pearson correlation", higher_is_better=True)
SPEARMAN = Metric("Spearman correlation", higher_is_better=True)
TASK_ACCURACY = Metric("acc", higher_is_better=True)
TOP_5_ACCURACY = Metric("top-5 accuracy", higher_is_better=True)
"""In records of earlier releases."""

_KNOWN = {metric.name: metric for metric in tuple(globals().values()) if isinstance(metric, Metric)}

LABEL_METRICS = ("accuracy", "matthews", "f1", "pearson", "spearman")
"""The metrics of labels, by the names that `--metric` takes."""


def require_label_metric(name: str | None) -> None:
    """Raise `PermpruneError` unless `name` is one of `LABEL_METRICS`, or None for the one that fits the labels."""
    if name is not None:
        require_choice("metric", name, LABEL_METRICS)


def metric_named(name: str) -> Metric:
    """Return the metric of a name that was read from a file.

    An unknown name, which no release of permprune has written, is treated as an error measure: lower is better.
    """
    return _KNOWN.get(name) or Metric(name, higher_is_better=False)


@dataclass(frozen=True)
class Result:
    """One measured `value` of `metric` on `task`, over `count` predictions of `unit`; `stderr` its standard error.

    `terms`, two tensors in fp64, (parts,), are the sums over parts of the examples of which the value is the ratio, or
    exp of it; None if it is no ratio of sums. `draws`, an array in fp64, (resamples,), are its values on resamples of
    the examples, the same ones for each model; None without a bootstrap. Neither is stored.
    """

    task: str
    metric: Metric
    value: float
    _: KW_ONLY
    count: int
    stderr: float | None = None
    unit: str = "examples"
    terms: Any = field(default=None, compare=False, repr=False)
    draws: Any = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, str | float | int | None]:
        """Return the fields, ready for `json.dumps`: the metric by its name, the count under the name of its unit."""
        fields = {name: value for name, value in vars(self).items() if name not in ("count", "unit", "terms", "draws")}
        return {**fields, "metric": self.metric.name, self.unit: self.count}


def share(
    task: str, metric: Metric, *, right: float, count: float, terms: tuple[Tensor, Tensor] | None = None
) -> Result:
    """Return the share of `right` among `count` predictions. Raises `PermpruneError` if `count` is 0."""
    if not count:
        raise PermpruneError("no example has a label: give examples with labels")
    value = right / count
    return Result(task, metric, value, count=int(count), stderr=(value * (1 - value) / count) ** 0.5, terms=terms)


def ratio_error(sums: Tensor, counts: Tensor) -> float | None:
    """Return the standard error of sum(sums) / sum(counts), both (parts,), by the delta method; None for one part."""
    if len(sums) < 2:
        return None
    spread = float((sums - sums.sum() / counts.sum() * counts).std() / counts.mean())
    return spread / math.sqrt(len(sums))


def difference_error(result: Result, dense: Result) -> float | None:
    """Return the standard error of the difference of two values by one metric on the same examples.

    What both get right or wrong cancels out: the error is often much smaller than that of one value. None if it is not
    known.
    """
    if result.draws is not None and dense.draws is not None:
        return float((result.draws - dense.draws).std(ddof=1))
    if result.terms is None or dense.terms is None:
        return result.stderr if dense.stderr == 0 else None
    error = ratio_error(result.terms[0] - dense.terms[0], result.terms[1])
    return error if error is None or result.metric != PERPLEXITY else result.value * error


def gap_closed(value: float, dense: float, none: float, *, metric: Metric = PERPLEXITY) -> float | None:
    """Return the share of the gap between the model pruned in natural order (`none`) and the dense one that is closed.

    The gap between perplexities is that of their logarithms. Returns None if the natural order is as good as the dense
    model, or if a value is not finite.
    """
    if not all(map(math.isfinite, (value, dense, none))):
        return None
    if metric == PERPLEXITY:
        value, dense, none = math.log(value), math.log(dense), math.log(none)
    closed, gap = none - value, none - dense
    if metric.higher_is_better:
        closed, gap = value - none, dense - none
    return closed / gap if gap > 0 else None
