"""The inner loops of the search, against PyTorch in float64 over random shapes, for every kernel that runs here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import native
from permprune.kernels.search import masks as search
from permprune.pattern import Pattern

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(1, 2), Pattern(3, 5), Pattern(7, 16)]


def scores(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Scores of few values, so that some are equal."""
    return torch.randint(6, (rows, width), generator=generator).float()


@given(st.sampled_from(PATTERNS), st.integers(1, 40), st.integers(1, 9), st.integers(0, 9), st.booleans(), st.data())
def test_masks_are_those_of_the_pattern(
    pattern: Pattern, groups: int, rows: int, others: int, transposed: bool, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    size = groups * pattern.m
    score = scores(rows, size + others, generator)
    columns = torch.randperm(size + others, generator=generator)[:size]
    expected = torch.rand(score.shape, generator=generator) < 0.5
    found = expected.clone()
    if transposed:
        score, found = score.T.contiguous().T, found.T.contiguous().T
    search.write_mask(found, score, columns, pattern)
    expected[:, columns] = pattern.mask(score[:, columns])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_kernel_masks_and_adds_up_the_same(kernel: str, pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(1)
    width = 19 * pattern.m
    score, columns = scores(33, width, generator), torch.randperm(width, generator=generator)
    weight, gradient = (torch.randn(33, width, generator=generator) for _ in range(2))
    mask = torch.zeros(33, width, dtype=torch.bool)
    search.write_mask(mask, score, columns, pattern)
    assert torch.equal(mask[:, columns], pattern.mask(score[:, columns]))
    expected = float((weight.double() * gradient.double() * mask).sum())
    for strided in (weight, weight.T.contiguous().T):
        found = search.kept_sum(score, strided, gradient, columns, pattern)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-5)


def placement(pattern: Pattern, count: int, rows: int, free: int, seed: int = 0) -> dict[str, Tensor]:
    """Matrices of some channels more than stand in groups, and `free` groups with a free slot each."""
    generator = torch.Generator().manual_seed(seed)
    channels = count * pattern.m + 3
    weight, slope = (torch.randn(channels, rows, generator=generator) for _ in range(2))
    error = weight * (torch.rand(channels, rows, generator=generator) < 0.5)
    groups = torch.randperm(channels, generator=generator)[: count * pattern.m].view(count, pattern.m)[:free]
    return {
        "score": scores(channels, rows, generator),
        "weight": weight,
        "slope": slope,
        "error": error,
        "curvature": torch.rand(channels, generator=generator),
        "groups": groups,
        "slots": torch.randint(pattern.m, (free,), generator=generator),
    }


def cost_of(given: dict[str, Tensor], pattern: Pattern) -> Tensor:
    matrices = [given[name] for name in ("score", "weight", "slope", "error")]
    rest = {name: given[name] for name in ("curvature", "groups", "slots")}
    cost = torch.zeros(len(given["groups"]), len(given["groups"]), dtype=torch.float64)
    search.add_placement_cost(cost, *matrices, **rest, pattern=pattern)
    return cost


def in_float64(given: dict[str, Tensor], pattern: Pattern) -> Tensor:
    """The cost of each channel in each group by trying it: what is pruned in the group, less what the channel costs."""
    own = {name: tensor.double() for name, tensor in given.items() if name not in ("groups", "slots")}
    curvature = own["curvature"][:, None]
    prune = ((own["weight"] - 2 * own["error"]) * curvature + own["slope"]) * own["weight"]
    groups, slots, count = given["groups"], given["slots"], len(given["groups"])
    cost = torch.zeros(count, count, dtype=torch.float64)
    for c in range(count):
        channel = groups[c, slots[c]]
        for g in range(count):
            members = groups[g].clone()
            members[slots[g]] = channel
            others = [i for i in range(pattern.m) if i != slots[g]]
            last = torch.tensor([*others, int(slots[g])])  # of equal scores the newcomer comes last
            kept = pattern.mask_groups(own["score"][members[last]][None], 1)[0]
            alone = pattern.mask_groups(
                torch.cat([own["score"][members[torch.tensor(others)]], torch.full_like(own["score"][:1], -1.0)])[None],
                1,
            )[0]
            pruned = (alone & ~kept)[:-1]
            gain = (prune[members[torch.tensor(others)]] * pruned).sum() - (prune[channel] * kept[-1]).sum()
            cost[c, g] = gain
    return cost


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("count", "rows"), [(1, 1), (5, 37), (9, 100)])
def test_every_kernel_finds_the_pruned_part(kernel: str, pattern: Pattern, count: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    channels = count * pattern.m
    score, weight = scores(channels, rows, generator), torch.randn(channels, rows, generator=generator)
    order = torch.randperm(channels, generator=generator)
    found = search.pruned_part(weight, score, order.view(count, -1), pattern)
    assert torch.equal(found, weight * ~pattern.mask_in_order(score.T, order).T)
    wide = search.pruned_part(weight.double(), score.double(), order.view(count, -1), pattern)
    assert torch.equal(found.double(), wide)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("count", "rows", "free"), [(1, 1, 1), (5, 37, 5), (9, 100, 6)])
def test_every_kernel_places_as_trying_does(kernel: str, pattern: Pattern, count: int, rows: int, free: int) -> None:
    given = placement(pattern, count, rows, free)
    torch.testing.assert_close(cost_of(given, pattern), in_float64(given, pattern), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8)], ids=str)
def test_every_kernel_gives_the_same_bits_and_pytorch_nearly(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    given = placement(pattern, 33, 700, 33)
    found = {}
    for name in [*native.names(), "torch"]:
        monkeypatch.setenv(native.FORCED, name)
        native._kernels.cache_clear()
        found[name] = cost_of(given, pattern)
    native._kernels.cache_clear()
    reference = found.pop("torch")
    for cost in found.values():
        assert torch.equal(cost, next(iter(found.values())))
        torch.testing.assert_close(cost, reference, rtol=1e-3, atol=1e-2)


def test_masks_do_not_depend_on_the_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    score, columns = torch.rand(600, 512, generator=generator), torch.randperm(512, generator=generator)
    masks, sums, threads = [], [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            masks.append(torch.zeros(600, 512, dtype=torch.bool))
            search.write_mask(masks[-1], score, columns, Pattern(2, 4))
            sums.append(search.kept_sum(score, score, score, columns, Pattern(2, 4)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2]) and len(set(sums)) == 1


@pytest.mark.parametrize("wrong", [-1, 8])
def test_columns_that_do_not_exist_are_refused(wrong: int) -> None:
    score, columns = torch.rand(2, 8), torch.arange(8)
    columns[3] = wrong
    with pytest.raises(PermpruneError, match="names channels that do not exist"):
        search.write_mask(torch.zeros(2, 8, dtype=torch.bool), score, columns, Pattern(2, 4))
    with pytest.raises(PermpruneError, match="names channels that do not exist"):
        search.kept_sum(score, score, score, columns, Pattern(2, 4))
    given = placement(Pattern(2, 4), 3, 5, 3)
    for name, value in (("groups", wrong - 1), ("slots", wrong)):
        broken = {**given, name: given[name].clone()}
        broken[name].view(-1)[0] = value if value < 0 else 99
        with pytest.raises(PermpruneError, match="names channels that do not exist"):
            cost_of(broken, Pattern(2, 4))


def test_a_placement_of_no_groups_costs_nothing() -> None:
    none = torch.zeros(4, 3)
    cost, groups, slots = torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, 4).long(), torch.zeros(0).long()
    search.add_placement_cost(
        cost, none, none, none, none, curvature=torch.zeros(4), groups=groups, slots=slots, pattern=Pattern(2, 4)
    )
    assert cost.shape == (0, 0)


def test_tensors_that_do_not_match_are_refused() -> None:
    score, columns, mask = torch.rand(2, 8), torch.arange(8), torch.zeros(2, 8, dtype=torch.bool)
    for arguments in ((mask[:1], score, columns), (mask.byte(), score, columns), (mask, score, columns.int())):
        with pytest.raises(PermpruneError, match=r"has (a mask|columns) of shape"):
            search.write_mask(*arguments, Pattern(2, 4))
    with pytest.raises(PermpruneError, match="matrices of different shapes"):
        search.kept_sum(score, score[:, :4], score, columns, Pattern(2, 4))
    with pytest.raises(PermpruneError, match="has groups of shape"):
        search.pruned_part(score.T, score.T, columns.view(4, 2), Pattern(2, 4))
    with pytest.raises(PermpruneError, match="has a mask of shape"):
        search.apply_mask(score, search.pack_mask(mask[:1]), torch.float32)
    given = placement(Pattern(2, 4), 3, 5, 3)
    for name in ("groups", "slots", "curvature"):
        with pytest.raises(PermpruneError, match=r"has (groups|slots|a curvature) of shape"):
            cost_of({**given, name: given[name][..., :-1]}, Pattern(2, 4))


def test_columns_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(PermpruneError, match="which 4 does not divide"):
        search.write_mask(torch.zeros(2, 8, dtype=torch.bool), torch.rand(2, 8), torch.arange(6), Pattern(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 16, 24, 41, 200])
def test_masked_weights_are_products_with_the_mask(kernel: str, dtype: torch.dtype, width: int) -> None:
    weight, mask = torch.randn(9, 2 * width), torch.rand(9, width) < 0.5
    bits = search.pack_mask(mask)
    for own in (weight[:, :width], weight[:, ::2], weight[:, width:].double()):
        assert torch.equal(search.apply_mask(own, bits, dtype), (own * mask).to(dtype))


def test_masked_weights_of_bf16_are_rounded_as_pytorch_does(kernel: str) -> None:
    bits = torch.randint(-(2**31), 2**31, (64, 1024), dtype=torch.int32)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45, 0.0, 1.00390625])
    weight = torch.cat([bits.view(torch.float32), special.repeat(64, 1)], 1)
    every = search.pack_mask(torch.ones(weight.shape, dtype=torch.bool))
    found, expected = search.apply_mask(weight, every, torch.bfloat16), weight.bfloat16()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num().view(torch.int16), expected.nan_to_num().view(torch.int16))
