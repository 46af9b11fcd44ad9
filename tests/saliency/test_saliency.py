"""The saliency metrics against their formulas, weight by weight."""

import pytest
import torch

from permprune.errors import PermpruneError
from permprune.saliency import RIA, SALIENCIES, Magnitude, Wanda, saliency

WEIGHT = torch.tensor([[1.0, -2.0, 0.5], [-4.0, 1.0, 0.0]])
NORM = torch.tensor([1.0, 0.25, 4.0])


def formula(metric: str, i: int, j: int) -> float:
    size, norm = WEIGHT.abs().tolist(), NORM.tolist()
    column, row = sum(r[j] for r in size), sum(size[i])
    return {
        "magnitude": size[i][j],
        "wanda": size[i][j] * norm[j],
        "ria": (size[i][j] / column + size[i][j] / row) * norm[j] ** 0.5,
    }[metric]


@pytest.mark.parametrize("metric", sorted(SALIENCIES))
def test_follows_its_formula(metric):
    expected = torch.tensor([[formula(metric, i, j) for j in range(3)] for i in range(2)])
    torch.testing.assert_close(saliency(metric).score(WEIGHT, NORM), expected)


def test_ria_takes_another_power():
    plain = RIA(power=0.0).score(WEIGHT, NORM)
    torch.testing.assert_close(RIA(power=2.0).score(WEIGHT, NORM), plain * NORM**2)


@pytest.mark.parametrize("metric", sorted(SALIENCIES))
def test_scores_dead_rows_and_channels_zero_instead_of_nan(metric):
    weight = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    score = saliency(metric).score(weight, torch.tensor([0.0, 1.0]))
    assert score[0].tolist() == [0, 0] and score[1, 0] == 0 and score[1, 1] > 0


@pytest.mark.parametrize("metric", sorted(SALIENCIES))
def test_scores_narrow_weights_in_fp32_and_leaves_them_alone(metric):
    weight = WEIGHT.bfloat16()
    score = saliency(metric).score(weight, NORM)
    assert score.dtype == torch.float32 and (score >= 0).all()
    assert torch.equal(weight, WEIGHT.bfloat16())


def test_looks_up_by_name_and_passes_objects_through():
    assert [type(saliency(name)) for name in ("magnitude", "wanda", "ria")] == [Magnitude, Wanda, RIA]
    metric = RIA(power=1.0)
    assert saliency(metric) is metric


def test_an_unknown_name_lists_the_names():
    with pytest.raises(PermpruneError, match='unknown saliency "taylor": choose one of magnitude, ria, wanda'):
        saliency("taylor")
