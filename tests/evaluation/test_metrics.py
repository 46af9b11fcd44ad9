"""Metrics of classes and scores, against their definitions, and their standard errors."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import LlamaForCausalLM

from permprune.errors import PermpruneError
from permprune.evaluation.dispatch import evaluate_model
from permprune.evaluation.metrics import OF_CLASSES, OF_SCORES, bootstrapped
from permprune.evaluation.result import PERPLEXITY, TOP_1_ACCURACY, Metric, Result, difference_error
from permprune.examples import Examples

from ..conversations import padded_answers
from ..modalities import draw, images, make, scorer, sentences, speech


@torch.no_grad()
def test_matthews_and_f1_of_two_classes() -> None:
    model = make("bert")
    model.classifier.weight[2] = 0  # the third class is never said
    model.classifier.bias[2] = -9
    logits = model(**sentences(labels=False)).logits
    model.classifier.bias[0] += (logits[:, 1] - logits[:, 0]).quantile(0.5)  # between two: no tie
    said = model(**sentences(labels=False)).logits.argmax(1)
    right = torch.where(torch.arange(12) % 4 > 0, said, 1 - said)
    data = Examples({**sentences(labels=False), "labels": right})
    tp, tn = (int(((said == k) & (right == k)).sum()) for k in (1, 0))
    fp, fn = (int(((said == k) & (right != k)).sum()) for k in (1, 0))
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    (matthews,) = evaluate_model(model, data, metric="matthews")
    assert matthews.metric.name == "Matthews correlation"
    assert matthews.value == pytest.approx((tp * tn - fp * fn) / below)
    (f1,) = evaluate_model(model, data, metric="f1")
    assert f1.value == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert f1.stderr and matthews.stderr
    assert evaluate_model(model, data, metric="f1") == [f1]


@torch.no_grad()
def test_f1_of_more_classes_is_their_mean() -> None:
    model, data = make("vit"), images()
    said, right = model(pixel_values=data["pixel_values"]).logits.argmax(1), data["labels"]
    classes = sorted({*said.tolist(), *right.tolist()})
    parts = [2 * int(((said == k) & (right == k)).sum()) / int((said == k).sum() + (right == k).sum()) for k in classes]
    (f1,) = evaluate_model(model, data, metric="f1")
    assert f1.value == pytest.approx(sum(parts) / len(parts))


@torch.no_grad()
def test_correlations_of_scores_and_their_errors() -> None:
    model, data = scorer(), sentences(labels=False)
    said = model(**data).logits[:, 0].double()
    right = said + said.std() * torch.randn(12, generator=torch.Generator().manual_seed(0))
    data = Examples({**data, "labels": right.float()})
    pearson, spearman = evaluate_model(model, data)
    assert (pearson.metric.name, spearman.metric.name) == ("Pearson correlation", "Spearman correlation")
    assert pearson.value == pytest.approx(stats.pearsonr(said, right).statistic, abs=1e-5)
    assert spearman.value == pytest.approx(stats.spearmanr(said, right).statistic, abs=1e-5)
    assert pearson.stderr == pytest.approx((1 - pearson.value**2) / math.sqrt(10), rel=0.8)  # of normal variables
    assert evaluate_model(model, data, metric="spearman") == [spearman, pearson]


def test_what_never_varies_has_no_correlation() -> None:
    data = Examples({**sentences(labels=False), "labels": torch.ones(12)})
    assert [result.value for result in evaluate_model(scorer(), data)] == [0.0, 0.0]


def test_metrics_of_another_kind_are_refused() -> None:
    with pytest.raises(PermpruneError, match="choose one of accuracy, matthews, f1"):
        evaluate_model(make("bert"), sentences(), metric="pearson")
    with pytest.raises(PermpruneError, match="choose one of pearson, spearman"):
        evaluate_model(scorer(), Examples({**sentences(), "labels": torch.rand(12)}), metric="f1")
    with pytest.raises(PermpruneError, match="needs labels"):
        evaluate_model(make("bert"), sentences(labels=False), metric="matthews")


@pytest.mark.parametrize("metric", ["f1", "accuracy"])
def test_metrics_of_labels_are_not_for_texts(metric: str, tiny_llama: LlamaForCausalLM) -> None:
    for model, data in ((make("whisper"), speech()), (tiny_llama, padded_answers()[0])):
        with pytest.raises(PermpruneError, match=f'"{metric}" is one of labels, one for each example: leave it out'):
            evaluate_model(model, data, metric=metric)
    with pytest.raises(PermpruneError, match=f'"{metric}" needs labels'):
        evaluate_model(tiny_llama, Examples.of(draw(128, 3, 8)), metric=metric)


def test_a_dense_model_is_compared_by_agreement_alone() -> None:
    model, other, scores = make("bert"), scorer(), Examples({**sentences(), "labels": torch.rand(12)})
    for metric in ("f1", "accuracy"):
        with pytest.raises(PermpruneError, match="compared by agreement alone, not by scores or a metric"):
            evaluate_model(model, sentences(), dense=model, metric=metric)
    with pytest.raises(PermpruneError, match="compared by agreement alone, not by scores or a metric"):
        evaluate_model(other, scores, dense=other)


@pytest.mark.parametrize("metric", [TOP_1_ACCURACY, PERPLEXITY])
def test_the_error_of_a_difference_is_that_of_pairs(metric: Metric) -> None:
    """Beside the spread of the difference over many draws of the same examples."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 4, (400, 500), generator=generator).double()
    easy = torch.rand(400, 500, generator=generator, dtype=torch.float64)
    sums, others = (counts * (easy + 0.1 * torch.rand(400, 500, generator=generator)) for _ in range(2))

    def result(terms: tuple[torch.Tensor, torch.Tensor]) -> Result:
        ratio = float(terms[0].sum() / terms[1].sum())
        return Result("task", metric, math.exp(ratio) if metric == PERPLEXITY else ratio, count=1, terms=terms)

    pairs = [(result((a, n)), result((b, n))) for a, b, n in zip(sums, others, counts, strict=True)]
    errors = [difference_error(one, other) for one, other in pairs]
    spread = stats.tstd([one.value - other.value for one, other in pairs])
    assert sum(error or 0.0 for error in errors) / len(errors) == pytest.approx(spread, rel=0.15)
    alone = stats.tstd([one.value for one, _ in pairs])
    assert spread < alone / 5  # what both find easy cancels out


@pytest.mark.parametrize("name", ["f1", "pearson", "spearman"])
def test_the_error_of_a_difference_is_known_of_metrics_that_are_no_ratios(name: str) -> None:
    """Beside the jackknife (Efron and Stein 1981), with fifty groups of examples."""
    draw, (metric, measure) = np.random.default_rng(0), (OF_CLASSES | OF_SCORES)[name]
    right = draw.normal(size=300)
    found = right, *(right + 0.6 * draw.normal(size=300) + 0.15 * draw.normal(size=(2, 300)))
    right, *predicted = found if name in OF_SCORES else ((one > 0).astype(float) for one in found)
    one, other = (bootstrapped("task", metric, measure, right, values) for values in predicted)
    groups = np.arange(300) % 50
    values = [
        np.subtract(*(measure(right[kept], values[kept]) for values in predicted))
        for kept in (groups != left for left in range(50))
    ]
    error = difference_error(one, other) or 0.0
    assert error == pytest.approx(math.sqrt(49 * np.var(values)), rel=0.25)
    assert one.stderr and error < one.stderr  # what both find easy cancels out


@pytest.mark.parametrize(("name", "data"), [("vit", images), ("bert", sentences), ("whisper", speech)])
def test_a_value_follows_from_its_terms(name: str, data: Callable[[], Examples]) -> None:
    (result, *_) = evaluate_model(make(name), data(), batch=5)
    assert result.terms is not None and len(result.terms[0]) > 1
    ratio = float(result.terms[0].sum() / result.terms[1].sum())
    assert result.value == pytest.approx(math.exp(ratio) if result.metric == PERPLEXITY else ratio)
    assert "terms" not in result.to_json()
