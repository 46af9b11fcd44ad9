"""The costs of moving channels, against trying each move in float64, for every kernel that runs here."""

import pytest
import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.search import gpu
from permprune.kernels.search.placement import add_placement_cost, place_reference
from permprune.pattern import Pattern
from tests.kernels.search.test_masks import PATTERNS, scores


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
    add_placement_cost(cost, *matrices, **rest, pattern=pattern)
    return cost


def in_float64(given: dict[str, Tensor], pattern: Pattern) -> Tensor:
    """The cost of each channel in each group by trying it: what is pruned in the group, less what the channel costs."""
    double = {name: tensor.double() for name, tensor in given.items() if name not in ("groups", "slots")}
    curvature = double["curvature"][:, None]
    prune = ((double["weight"] - 2 * double["error"]) * curvature + double["slope"]) * double["weight"]
    groups, slots, count = given["groups"], given["slots"], len(given["groups"])
    cost = torch.zeros(count, count, dtype=torch.float64)
    for c in range(count):
        channel = groups[c, slots[c]]
        for g in range(count):
            members = groups[g].clone()
            members[slots[g]] = channel
            others = [i for i in range(pattern.m) if i != slots[g]]
            last = torch.tensor([*others, int(slots[g])])  # of equal scores the newcomer comes last
            kept = pattern.mask_groups(double["score"][members[last]][None], 1)[0]
            alone = pattern.mask_groups(
                torch.cat([double["score"][members[torch.tensor(others)]], torch.full_like(double["score"][:1], -1.0)])[
                    None
                ],
                1,
            )[0]
            pruned = (alone & ~kept)[:-1]
            gain = (prune[members[torch.tensor(others)]] * pruned).sum() - (prune[channel] * kept[-1]).sum()
            cost[c, g] = gain
    return cost


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("count", "rows", "free"), [(1, 1, 1), (5, 37, 5), (9, 100, 6)])
def test_every_kernel_places_as_trying_does(kernel: str, pattern: Pattern, count: int, rows: int, free: int) -> None:
    given = placement(pattern, count, rows, free)
    torch.testing.assert_close(cost_of(given, pattern), in_float64(given, pattern), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8)], ids=str)
def test_every_kernel_gives_the_same_bits_and_pytorch_nearly(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    given = placement(pattern, 33, 700, 33)
    found = {}
    for name in [*library.names(), "torch"]:
        monkeypatch.setenv(library.FORCED, name)
        library.chosen.cache_clear()
        found[name] = cost_of(given, pattern)
    library.chosen.cache_clear()
    reference = found.pop("torch")
    for cost in found.values():
        assert torch.equal(cost, next(iter(found.values())))
        torch.testing.assert_close(cost, reference, rtol=1e-3, atol=1e-2)


def test_a_placement_of_no_groups_costs_nothing() -> None:
    none = torch.zeros(4, 3)
    cost, groups, slots = torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, 4).long(), torch.zeros(0).long()
    add_placement_cost(
        cost, none, none, none, none, curvature=torch.zeros(4), groups=groups, slots=slots, pattern=Pattern(2, 4)
    )
    assert cost.shape == (0, 0)


@pytest.mark.parametrize("wrong", [-1, 8])
def test_channels_that_do_not_exist_are_refused(wrong: int) -> None:
    given = placement(Pattern(2, 4), 3, 5, 3)
    for name, value in (("groups", wrong - 1), ("slots", wrong)):
        broken = {**given, name: given[name].clone()}
        broken[name].view(-1)[0] = value if value < 0 else 99
        with pytest.raises(PermpruneError, match="names channels that do not exist"):
            cost_of(broken, Pattern(2, 4))


def test_tensors_that_do_not_match_are_refused() -> None:
    given = placement(Pattern(2, 4), 3, 5, 3)
    for name in ("groups", "slots", "curvature"):
        with pytest.raises(PermpruneError, match=r"has (groups|slots|a curvature) of shape"):
            cost_of({**given, name: given[name][..., :-1]}, Pattern(2, 4))


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (7, 40), (19, 100)])
def test_the_triton_kernel_gives_what_pytorch_gives(count: int, rows: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # Triton's interpreter
    matrices: list[Tensor] = [torch.randint(4, (count, rows), device=device).float() for _ in range(4)]
    torch.testing.assert_close(gpu.place(*matrices), place_reference(*matrices))
