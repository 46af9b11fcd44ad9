"""Factored second moments: where they are those of Adam, under a mask, and continued."""

import torch
from torch import Tensor

from permprune.kernels.search.masks import pack_mask
from permprune.training.second_moments import SecondMoments

BETA = 0.95


def roots_of(moments: SecondMoments, gradients: list[Tensor], first: int = 1) -> Tensor:
    for step, gradient in enumerate(gradients, first):
        found = moments.with_gradient(gradient, step=step, beta=BETA)
    return torch.outer(*found)


def test_moments_of_rank_one_are_those_of_adam() -> None:
    rows, channels = torch.rand(6) + 0.1, torch.rand(16) + 0.1
    gradients = [scale * torch.outer(rows, channels) * torch.randn(6, 16).sign() for scale in (1.0, 3.0, 0.5)]
    expected = torch.zeros(6, 16)
    for gradient in gradients:
        expected = BETA * expected + (1 - BETA) * gradient.square()
    found = roots_of(SecondMoments(pack_mask(torch.ones(6, 16, dtype=torch.bool)), 16), gradients)
    torch.testing.assert_close(found, (expected / (1 - BETA**3)).sqrt())


def test_what_the_mask_prunes_does_not_count() -> None:
    mask = torch.rand(6, 4, 4).argsort(-1).lt(2).flatten(1)
    mask[:, 0], mask[:, 1:4] = False, torch.tensor([True, True, False])  # a channel that no row keeps
    gradient, other = torch.randn(2, 6, 16)
    found = [roots_of(SecondMoments(pack_mask(mask), 16), [g]) for g in (gradient, torch.where(mask, gradient, other))]
    assert torch.equal(*found)
    squares = gradient.square() * mask
    by_row, by_channel = squares.sum(1) / 8, squares.sum(0) / mask.sum(0).clamp_min(1)
    torch.testing.assert_close(found[0], (torch.outer(by_row, by_channel) / squares[mask].mean()).sqrt())


def test_saved_means_go_on() -> None:
    bits, gradients = pack_mask(torch.ones(6, 16, dtype=torch.bool)), [*torch.randn(4, 6, 16)]
    whole, begun = SecondMoments(bits, 16), SecondMoments(bits, 16)
    roots_of(begun, gradients[:2])
    resumed = SecondMoments(bits, 16, begun.means.clone())
    assert torch.equal(roots_of(resumed, gradients[2:], 3), roots_of(whole, gradients))


def test_no_gradient_gives_no_moments() -> None:
    moments = SecondMoments(pack_mask(torch.ones(2, 8, dtype=torch.bool)), 8)
    assert torch.equal(roots_of(moments, [torch.zeros(2, 8)]), torch.zeros(2, 8))
