"""The algebra of axes: products and concatenations keep every index in its place."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from permprune.coupling.axes import Axis, align, concat, cut, factor, find, freeze, occurrences, product, unify

sizes = st.lists(st.sampled_from([2, 3, 4, 6]), min_size=1, max_size=3)


def reached(axis: Axis) -> list[int]:
    """Every position that the atoms of an axis reach, sorted."""
    found = []
    for spot in occurrences([axis]):
        offsets = [spot.offset + spot.stride * index for index in range(spot.atom.size)]
        for loop in spot.siblings:
            offsets = [offset + loop.stride * index for offset in offsets for index in range(loop.axis.size)]
        found.append(sorted(offsets))
    return sorted(found)


def addresses(axis: Axis) -> list[tuple]:
    """For each position, the path of (atom, index) that names it."""
    root = find(axis)
    if root.kind == "atom":
        return [((id(root), index),) for index in range(root.size)]
    if root.kind == "concat":
        return [path for part in root.parts for path in addresses(part)]
    paths: list[tuple] = [()]
    for part in root.parts:
        paths = [left + right for left in paths for right in addresses(part)]
    return paths


@given(sizes, sizes)
def test_aligned_products_name_every_position_alike_or_are_frozen(left, right):
    a, b = [Axis(size) for size in left], [Axis(size) for size in right]
    scale = math.lcm(math.prod(left), math.prod(right))
    a.append(Axis(scale // math.prod(left)))
    b.append(Axis(scale // math.prod(right)))
    one, other = product(a), product(b)
    if align([one], [other], "misfit"):
        assert addresses(one) == addresses(other)
    else:
        for axis in (one, other):
            assert any(spot.atom.reason == "misfit" for spot in occurrences([axis]))


@given(st.sets(st.integers(1, 11)), st.sets(st.integers(1, 11)), st.sampled_from([2, 3, 4, 6]))
def test_cuts_and_factors_of_one_axis_agree(first, second, outer):
    axis, alias = Axis(12), Axis(12)
    cut(axis, sorted(first))
    cut(alias, sorted(second))
    unify(axis, alias, "misfit")
    halves = factor(axis, outer, "misfit")
    assert addresses(axis) == addresses(alias)
    if halves is not None:
        assert addresses(product(halves)) == addresses(axis)
    covered = {position for spot in reached(axis) for position in spot}
    assert covered == set(range(12))


def test_a_product_cut_between_its_rows_becomes_a_concatenation():
    heads, width = Axis(4), Axis(3)
    whole = product([heads, width])
    pieces = cut(whole, [3, 6])
    assert pieces is not None
    assert [piece.size for piece in pieces] == [3, 3, 6]
    assert find(pieces[0]) is find(pieces[1]) is find(width)
    assert cut(whole, [1]) is not None
    assert cut(product([Axis(2), Axis(3)]), [2]) is None


def test_frozen_axes_stay_frozen_when_they_are_split_or_joined():
    axis = Axis(12)
    freeze(axis, reason="first")
    freeze(axis, reason="second")
    halves = factor(axis, 3, "misfit")
    assert halves is not None
    assert [half.reason for half in halves] == ["first", "first"]
    other = Axis(12)
    unify(other, axis, "misfit")
    assert [spot.atom.reason for spot in occurrences([other])] == ["first", "first"]


def test_halves_swapped_are_tied():
    left, right = Axis(3), Axis(3)
    unify(concat([left, right]), concat([right, left]), "misfit")
    assert find(left) is find(right)
    assert not find(left).reason
