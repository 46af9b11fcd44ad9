"""Cross-entropy and divergence, a few terms at a time."""

import pytest
import torch
import torch.nn.functional as F

from permprune.losses import cross_entropy as module
from permprune.losses.cross_entropy import cross_entropy, divergence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 40, 2**20])
def test_value_and_gradient_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, at_once: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    torch.manual_seed(0)
    logits = (3 * torch.randn(23, 17)).to(dtype).requires_grad_()
    labels = torch.randint(17, (23,))
    wanted = F.cross_entropy(logits.float(), labels, reduction="sum")
    (slope,) = torch.autograd.grad(0.7 * wanted, logits)
    found = cross_entropy(logits, labels)
    torch.testing.assert_close(found, wanted)
    (own,) = torch.autograd.grad(0.7 * found, logits)
    assert own.dtype == dtype
    torch.testing.assert_close(own, slope)


@pytest.mark.parametrize("at_once", [40, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_of_the_divergence_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, at_once: int
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    torch.manual_seed(0)
    logits, target = (3 * torch.randn(2, 23, 17)).to(dtype)
    logits.requires_grad_()
    sides = (side.float().log_softmax(-1) for side in (logits, target))
    wanted = F.kl_div(*sides, reduction="sum", log_target=True)
    (slope,) = torch.autograd.grad(0.7 * wanted, logits)
    found = divergence(logits, target)
    torch.testing.assert_close(found, wanted)
    (own,) = torch.autograd.grad(0.7 * found, logits)
    assert own.dtype == dtype
    torch.testing.assert_close(own, slope)


def test_logits_out_of_range_are_not_hidden() -> None:
    logits = torch.tensor([[float("nan"), 0.0], [float("inf"), 0.0]])
    assert not cross_entropy(logits, torch.tensor([1, 1])).isfinite()
    assert cross_entropy(torch.tensor([[1000.0, 0.0]]), torch.tensor([1])) == 1000
