"""The saliency metrics against their formulas, weight by weight."""

import pytest
import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.saliency.metrics import OBS, RIA, SALIENCIES, Magnitude, Wanda, saliency

WEIGHT = torch.tensor([[1.0, -2.0, 0.5], [-4.0, 1.0, 0.0]])
NORM = torch.tensor([1.0, 0.25, 4.0])
MOMENTS = torch.tensor([[1.0, 0.2, -1.0], [0.2, 0.0625, 0.5], [-1.0, 0.5, 16.0]])


def formula(metric: str, i: int, j: int) -> float:
    size, norm = WEIGHT.abs().tolist(), NORM.tolist()
    column, row = sum(r[j] for r in size), sum(size[i])
    return {
        "magnitude": size[i][j],
        "wanda": size[i][j] * norm[j],
        "ria": (size[i][j] / column + size[i][j] / row) * norm[j] ** 0.5,
        "obs": size[i][j] * unexplained(MOMENTS, 0.01)[j] ** 0.5,
    }[metric]


def unexplained(moments: Tensor, damping: float) -> list[float]:
    """Of each channel the mean square that the others do not explain: H_jj - H_jF (H_FF)^-1 H_Fj, H damped."""
    wide = moments.double()
    wide = wide + damping * wide.diagonal().mean() * torch.eye(len(wide))
    found = []
    for j in range(len(wide)):
        others = [i for i in range(len(wide)) if i != j]
        explained = wide[j, others] @ torch.linalg.inv(wide[others][:, others]) @ wide[others, j]
        found.append(float(wide[j, j] - explained))
    return found


@pytest.mark.parametrize("metric", sorted(SALIENCIES))
def test_follows_its_formula(metric):
    expected = torch.tensor([[formula(metric, i, j) for j in range(3)] for i in range(2)])
    torch.testing.assert_close(saliency(metric).score(WEIGHT, MOMENTS), expected)


def test_ria_takes_another_power():
    plain = RIA(power=0.0).score(WEIGHT, MOMENTS)
    torch.testing.assert_close(RIA(power=2.0).score(WEIGHT, MOMENTS), plain * NORM**2)


def test_obs_takes_another_damping():
    expected = WEIGHT.abs() * torch.tensor(unexplained(MOMENTS, 0.5)).sqrt()
    torch.testing.assert_close(OBS(damping=0.5).score(WEIGHT, MOMENTS), expected)


@pytest.mark.parametrize("metric", sorted(SALIENCIES))
def test_scores_dead_rows_and_channels_zero_instead_of_nan(metric):
    weight = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    score = saliency(metric).score(weight, torch.diag(torch.tensor([0.0, 1.0])))
    assert score[0].tolist() == [0, 0] and score[1, 0] == 0 and score[1, 1] > 0


@pytest.mark.parametrize("metric", sorted(SALIENCIES.keys() - {"magnitude"}))
def test_channels_that_are_always_zero_score_zero(metric):
    dead = torch.tensor([True, False, False])
    assert saliency(metric).score(WEIGHT, MOMENTS * ~dead * ~dead[:, None])[:, 0].tolist() == [0, 0]
    assert not saliency(metric).score(WEIGHT, torch.zeros(3, 3)).any()


def test_obs_scores_channels_that_others_explain_by_the_damping_alone():
    """Two channels that are always alike: H is singular, and either makes up for the other."""
    alike = torch.block_diag(torch.ones(2, 2), torch.ones(1, 1))
    score = OBS().score(torch.ones(1, 3), alike)[0]
    assert score[:2].tolist() == pytest.approx(2 * [(0.01 + 0.01 / 1.01) ** 0.5], rel=1e-4)
    assert float(score[2]) == pytest.approx(1.01**0.5)


def test_obs_refuses_moments_that_no_inputs_have():
    with pytest.raises(PermpruneError, match="no Cholesky factor"):
        OBS().score(WEIGHT, -MOMENTS)


@pytest.mark.parametrize("metric", sorted(SALIENCIES))
def test_scores_narrow_weights_in_fp32_and_leaves_them_alone(metric):
    weight, moments = WEIGHT.bfloat16(), MOMENTS.clone()
    score = saliency(metric).score(weight, moments)
    assert score.dtype == torch.float32 and (score >= 0).all()
    assert torch.equal(weight, WEIGHT.bfloat16()) and torch.equal(moments, MOMENTS)


def test_looks_up_by_name_and_passes_objects_through():
    assert [type(saliency(name)) for name in ("magnitude", "wanda", "ria", "obs")] == [Magnitude, Wanda, RIA, OBS]
    metric = RIA(power=1.0)
    assert saliency(metric) is metric


def test_an_unknown_name_lists_the_names():
    with pytest.raises(PermpruneError, match='unknown saliency "taylor": choose one of magnitude, wanda, ria, obs'):
        saliency("taylor")
