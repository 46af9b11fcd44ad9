"""The quadratic model against direct evaluation of its formula, and its moves against brute force."""

from functools import partial
from itertools import permutations

import pytest
import torch
from torch import Tensor

from permprune.kernels.search.masks import pruned_weights
from permprune.matching.assignment import assign, pair_up, random_parts
from permprune.pattern import Pattern
from permprune.permuters.bundles import Bundle, Rows
from permprune.permuters.quadratic import QuadraticModel
from permprune.system.shelf import Shelf

ROWS = (5, 3)  # of the two bundles that share the channels


def masked(weight: Tensor, score: Tensor, order: Tensor, pattern: Pattern) -> Tensor:
    """The pruned part of `weight` (channels, rows) when the channels stand in `order`."""
    error = torch.zeros_like(weight)
    keep = pattern.mask(score[order].T).T
    error[order] = weight[order] * ~keep
    return error


def submatrix(matrix: Tensor, channels: Tensor) -> Tensor:
    return matrix[channels][:, channels]


def moments_of(bundle: Bundle) -> Tensor:
    return bundle.moments(torch.arange(len(bundle.diagonal)))


def build(
    groups: int,
    pattern: Pattern,
    seed: int,
    damping: float = 1.5,
    local: bool = False,
    diagonal: bool = False,
    mean: float = 0.0,
    coupled: bool = False,
):
    """A random model in fp64 at a random order; `mean` is that of every input.

    The first rows of a bundle make one layer, read in two blocks, the last two another. If `coupled`, each is read as
    one block, and its rows have correlations.
    """
    generator = torch.Generator().manual_seed(seed)
    channels = groups * pattern.m

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    order = torch.randperm(channels, generator=generator)
    bundles = []
    for rows in ROWS:
        weight, x = normal(channels, rows), normal(3 * channels, channels) + mean
        moments = x.T @ x / len(x)
        if diagonal:
            moments = moments.diagonal().diag()
        score = weight.abs() * moments.diagonal().sqrt()[:, None]
        error = masked(weight, score, order, pattern)
        slope = moments @ error if local else 5 * normal(channels, rows)
        layers = list[Rows]()
        for own in (slice(0, rows - 2), slice(rows - 2, rows)):
            parts = [[x[:, own] for x in (weight, score, slope)]]
            size = parts[0][0].shape[1]
            if not coupled and size > 2:
                parts = [[x[:, :2] for x in parts[0]], [x[:, 2:] for x in parts[0]]]
            blocks = [(part[0], part[1]) for part in parts]
            coupling = normal(size, 9).corrcoef().view(size, size) if coupled else None
            layers.append(Rows(partial(iter, blocks), Shelf(), pattern, coupling))
            for part in parts:
                layers[-1].add(part[2].clone())
        bundles.append(Bundle(partial(submatrix, moments), moments.diagonal(), layers))
    return QuadraticModel(bundles, order, pattern, damping)


class Reference:
    """The model's value at any order, from the formula alone."""

    def __init__(self, model: QuadraticModel) -> None:
        self.pattern, self.damping = model.pattern, model.damping
        self.start = []
        for bundle in model.bundles:
            weight, score = (
                torch.cat(x, 1) for x in zip(*(pair for r in bundle.rows for pair in r.read()), strict=True)
            )
            couplings = [
                torch.eye(sum(slope.shape[1] for slope in rows.slopes.values()), dtype=torch.float64)
                if rows.coupling is None
                else rows.coupling
                for rows in bundle.rows
            ]
            error = masked(weight, score, model.order, model.pattern)
            self.start.append((weight, score, moments_of(bundle), slopes(bundle), error, torch.block_diag(*couplings)))

    def __call__(self, order: Tensor) -> float:
        total = 0.0
        for weight, score, moments, slope, error, rows in self.start:
            change = masked(weight, score, order, self.pattern) - error
            total += float((slope * change).sum() + self.damping / 2 * (change * (moments @ change @ rows)).sum())
        return total

    def check(self, model: QuadraticModel) -> None:
        """The order is a permutation, and the slope is the model's gradient there."""
        assert model.order.sort().values.tolist() == list(range(len(model.order)))
        for bundle, (weight, score, moments, slope, error, rows) in zip(model.bundles, self.start, strict=True):
            change = masked(weight, score, model.order, self.pattern) - error
            expected = slope + self.damping * moments @ change @ rows
            torch.testing.assert_close(slopes(bundle), expected, atol=1e-9, rtol=1e-9)


def slopes(bundle: Bundle) -> Tensor:
    """All slopes of a bundle, (channels, rows)."""
    return torch.cat([slope for rows in bundle.rows for slope in rows.slopes.values()], 1)


def swapped(order: Tensor, i: int, j: int) -> Tensor:
    order = order.clone()
    order[[i, j]] = order[[j, i]]
    return order


def free(model: QuadraticModel, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some groups, and a random slot of each."""
    at = torch.randperm(len(model.groups), generator=generator)[:count]
    return at, torch.randint(model.pattern.m, (count,), generator=generator)


def reassign(model: QuadraticModel, generator: torch.Generator) -> None:
    at, slots = free(model, len(model.groups), generator)
    cost = model.placement_cost(at, slots)
    model.move(at, slots, assign(cost), cost)


@pytest.fixture(params=[Pattern(2, 4), Pattern(1, 4), Pattern(3, 4), Pattern(1, 2), Pattern(2, 4, 2)], ids=str)
def pattern(request) -> Pattern:
    return request.param


@pytest.mark.parametrize(("seed", "coupled"), [(0, False), (1, True)])
def test_one_pair_swaps_down_to_where_no_swap_gains(pattern, seed, coupled):
    """Two groups make one pair, so every step is one swap: predicted exactly, and taken only if it gains."""
    model = build(2, pattern, seed, coupled=coupled)
    value, generator = Reference(model), torch.Generator().manual_seed(seed)
    m, here = pattern.m, 0.0
    for _ in range(5 * m * m):  # each draws one of m * m swaps: enough to try all of them after the last that gains
        order, predicted = model.order, model.change
        model.swap(generator)
        before, here = here, here if torch.equal(model.order, order) else value(model.order)
        assert model.change - predicted == pytest.approx(here - before, abs=1e-9)
        assert here <= before + 1e-9
    value.check(model)
    assert all(value(swapped(model.order, i, m + j)) >= here - 1e-9 for i in range(m) for j in range(m))


def test_local_model_is_the_output_error(pattern):
    """With slope H E and damping 1 the model is half of tr(E^T H E), not only to second order."""
    model = build(2, pattern, seed=0, damping=1.0, local=True)

    def output_error() -> float:
        total = 0.0
        for bundle in model.bundles:
            for rows in bundle.rows:
                for weight, score in rows.read():
                    error = pruned_weights(weight, score, model.groups, pattern)
                    total += float((error * (moments_of(bundle) @ error)).sum()) / 2
        return total

    start, generator = output_error(), torch.Generator().manual_seed(0)
    for _ in range(20):
        model.swap(generator)
        assert start + model.change == pytest.approx(output_error(), rel=1e-9)
    assert output_error() < start


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_swaps_in_several_pairs_are_predicted_exactly_and_never_raise_the_model(pattern, mean, coupled):
    """Channels with a large common mean carry much the same: what gains alone overshoots where all of them move.

    One of the seven groups has no other to swap with.
    """
    model = build(7, pattern, seed=2, mean=mean, coupled=coupled)
    value, generator = Reference(model), torch.Generator().manual_seed(2)
    last = 0.0
    for _ in range(25):
        model.swap(generator)
        assert model.change == pytest.approx(value(model.order), abs=1e-9)
        assert model.change <= last
        last = model.change
    assert last < 0
    value.check(model)


@pytest.mark.parametrize("seed", range(3))
def test_placement_cost_of_two_channels_is_exact_where_channels_do_not_interact(pattern, seed):
    model = build(6, pattern, seed, diagonal=True)
    value = Reference(model)
    at, slots = free(model, 4, torch.Generator().manual_seed(seed))
    cost = model.placement_cost(at, slots)
    assert torch.equal(cost.diagonal(), torch.zeros_like(cost.diagonal()))
    place = at * pattern.m + slots
    for a in range(4):
        for b in range(a):
            change = value(swapped(model.order, int(place[a]), int(place[b])))
            assert float(cost[a, b] + cost[b, a]) == pytest.approx(change, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_reassignment_is_the_best_of_all_where_channels_do_not_interact(pattern, seed):
    model = build(6, pattern, seed, diagonal=True)
    value = Reference(model)
    at, slots = free(model, 4, torch.Generator().manual_seed(seed))
    place = at * pattern.m + slots
    candidates = []
    for target in permutations(range(4)):
        order = model.order.clone()
        order[place[list(target)]] = model.order[place]
        candidates.append(value(order))
    cost = model.placement_cost(at, slots)
    model.move(at, slots, assign(cost), cost)
    assert value(model.order) == pytest.approx(min(candidates), abs=1e-5)
    assert model.change == pytest.approx(min(candidates), abs=1e-5)
    value.check(model)


@pytest.mark.parametrize(("seed", "coupled"), [(0, False), (1, True)])
def test_reassignment_never_raises_the_model_and_predicts_exactly(pattern, seed, coupled):
    model = build(6, pattern, seed, coupled=coupled)
    value, generator = Reference(model), torch.Generator().manual_seed(seed)
    last = 0.0
    for _ in range(20):
        reassign(model, generator)
        now = value(model.order)
        assert now <= last + 1e-9
        assert model.change == pytest.approx(now, abs=1e-9)
        last = now
    assert last < 0
    value.check(model)


@pytest.mark.parametrize("seed", range(6))
def test_a_move_goes_to_the_slots_it_names_if_the_model_falls(seed):
    model = build(5, Pattern(2, 4), seed)
    value = Reference(model)
    at, slots, target = torch.tensor([4, 0, 2]), torch.tensor([0, 1, 3]), torch.tensor([1, 2, 0])
    expected = model.groups.clone()
    for i, to in enumerate(target):
        expected[at[to], slots[to]] = model.groups[at[i], slots[i]]
    if value(expected.flatten()) > 0:
        expected = model.groups.clone()
    model.move(at, slots, target, torch.full((3, 3), -1.0))  # the cost claims a gain; the model decides
    assert torch.equal(model.groups, expected)


@pytest.fixture
def parts_of_three(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most three groups swap with each other."""
    monkeypatch.setattr("permprune.permuters.quadratic.PART", 3 * pattern.m)


@pytest.mark.usefixtures("parts_of_three")
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("times", [1, 4])
def test_swaps_inside_parts_are_exact_without_the_interaction_of_parts(pattern, times, coupled):
    model = build(8, pattern, seed=3, coupled=coupled)
    parts = random_parts(8, 3, torch.Generator().manual_seed(5))
    channels = [model.groups[part].flatten() for part in parts]
    part_of = torch.cat([torch.full((len(own),), i) for i, own in enumerate(channels)])[torch.cat(channels).argsort()]
    for bundle in model.bundles:
        alone = moments_of(bundle) * (part_of[:, None] == part_of)
        bundle.moments = partial(submatrix, alone)
    value = Reference(model)
    model.swap(torch.Generator().manual_seed(5), times)
    assert model.change == pytest.approx(value(model.order), abs=1e-9)
    assert model.change < 0 or (pattern.unit > 1 and times == 1)  # the swap drawn of each pair need not gain
    value.check(model)
    for part, own in zip(parts, channels, strict=True):
        assert torch.equal(model.groups[part].flatten().sort().values, own.sort().values)


@pytest.mark.usefixtures("parts_of_three")
def test_each_part_swaps_as_a_problem_of_its_own_would(pattern):
    """The groups of the first part, of a model that has only these channels, in the same random slots."""
    whole, generator = build(6, pattern, seed=4), torch.Generator().manual_seed(6)
    (first, _), start = random_parts(6, 3, generator), whole.groups.clone()
    slots = torch.randint(pattern.m, (6,), generator=generator)
    whole.swap(torch.Generator().manual_seed(6))
    own = build(6, pattern, seed=4)
    cost = own.placement_cost(first, slots[first])
    pairs = first[pair_up(cost + cost.T)]
    changed = (whole.groups[first] != start[first]).any(1)
    assert set(first[changed].tolist()) <= set(pairs.flatten().tolist())
    for a, b in pairs.tolist():
        swap = start.clone()
        swap[a, slots[a]], swap[b, slots[b]] = start[b, slots[b]], start[a, slots[a]]
        assert any(torch.equal(whole.groups[[a, b]], groups[[a, b]]) for groups in (start, swap))


@pytest.mark.usefixtures("parts_of_three")
def test_the_same_seed_gives_the_same_parts(pattern):
    orders = []
    for seed in (7, 7, 8):
        model = build(8, pattern, seed=0)
        model.swap(torch.Generator().manual_seed(seed), 3)
        orders.append(model.order)
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


def test_an_order_taken_earlier_does_not_move_with_the_model():
    model, generator = build(4, Pattern(2, 4), seed=0), torch.Generator().manual_seed(0)
    taken = model.order
    start = taken.clone()
    while torch.equal(model.order, start):
        model.swap(generator)
    assert torch.equal(taken, start)


def test_the_same_seed_gives_the_same_order():
    orders = []
    for _ in range(2):
        model, generator = build(6, Pattern(2, 4), seed=4), torch.Generator().manual_seed(4)
        for _ in range(20):
            model.swap(generator)
            reassign(model, generator)
        orders.append(model.order)
    assert torch.equal(*orders)
