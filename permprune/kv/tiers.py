"""How many channels each head keeps within a budget of bytes, chosen by the error of the output of attention."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kv.attention import Plain, attend
from permprune.kv.calibration import SIDES, ObservedLayer, Probe, fit_channels
from permprune.kv.config import DENSE, KVConfig, pattern_of, stored_type, token_bytes
from permprune.kv.packing import Channels, Layout, decode, encode
from permprune.options import Positive, require
from permprune.pattern import Pattern
from permprune.system.progress import track

TIERS = 12
"""Number of different numbers of channels that a head may keep."""


def require_budget(config: KVConfig, budget: float) -> None:
    """Raise `PermpruneError` unless heads can get numbers of channels of their own with these settings."""
    require("bytes", budget, Positive)
    if stored_type(config.dtype) is None:
        raise PermpruneError("--bytes needs the type of the values: give --dtype int5, or another by name")


def choose_tiers(
    observed: Mapping[int, ObservedLayer], config: KVConfig, budget: float
) -> dict[int, tuple[Channels, Channels]]:
    """Return the channels of all layers, of which each head keeps as many as lower the error most for their bytes.

    `budget` is the number of bytes of a packed token relative to that of 16-bit states. The error is that of the output
    of attention on the probes of each layer, squared and relative to its output, with pruned keys and whole values, and
    the other way round. From the fewest channels on, the keys or values of a head get more, wherever these lower the
    sum of the errors most for each byte. Raises `PermpruneError` if the budget is too small or larger than can be used.
    """
    errors, sizes = [], []
    for number in track(sorted(observed), "choosing the channels of each head"):
        layer = observed[number]
        outputs = [attend(probe.call, Plain(probe.keys, probe.values)) for probe in layer.probes]
        energy = sum(float(output.square().sum()) for output in outputs)
        for side in SIDES:
            tiers = tiers_of(layer.width_of(side), config)
            own = _tier_errors(layer, side, config, list(tiers), outputs) / max(energy, 1e-30)
            errors += own.T.tolist()
            sizes += [list(tiers.values())] * layer.heads
    whole = sum(2 * layer.width_of(side) * layer.heads for layer in observed.values() for side in SIDES)
    least, most = (sum(own[end] for own in sizes) / whole for end in (0, -1))
    if not least <= budget <= most:
        raise PermpruneError(
            f"with {config.dtype} values a token takes from {least:.3f} to {most:.3f} of 16 bits, and --bytes is "
            f"{budget:g}: give a number between, or another --dtype"
        )
    chosen = iter(spend(errors, sizes, budget * whole))
    channels = {}
    for number in sorted(observed):
        layer, sides = observed[number], []
        for side in SIDES:
            counts = list(tiers_of(layer.width_of(side), config))
            kept = torch.tensor([counts[next(chosen)] for _ in range(layer.heads)])
            sides.append(_fitted(layer, side, config, kept))
        channels[number] = sides[0], sides[1]
    return channels


def tiers_of(width: int, config: KVConfig) -> dict[int, int]:
    """Return the bytes of a token of a head by the number of its `width` channels that it may keep, both rising.

    The last keeps all, which needs no code of the kept channels, so that some numbers below take more bytes.
    """
    recovers = config.recovery == "sign"
    counts = sorted({max(1, round(width * step / TIERS / 2) * 2) for step in range(1, TIERS)})
    sizes = {kept: token_bytes(kept, width, config.dtype, recovers=recovers) for kept in counts}
    whole = token_bytes(width, width, config.dtype)
    by_size = {size: kept for kept, size in sizes.items() if size < whole}  # of the same size the most channels
    return {by_size[size]: size for size in sorted(by_size)} | {width: whole}


def spend(errors: list[list[float]], sizes: list[list[int]], budget: float) -> list[int]:
    """Return the tier of each unit, which starts at the first and is raised where that gains most for each byte.

    `errors` and `sizes` have a number for each tier of a unit; sizes rise. `budget` is the sum of the sizes.
    """
    chosen, left = [0] * len(errors), budget - sum(own[0] for own in sizes)
    heap: list[tuple[float, int, int]] = []

    def offer(unit: int) -> None:
        now, own, size = chosen[unit], errors[unit], sizes[unit]
        fitting = [tier for tier in range(now + 1, len(own)) if size[tier] - size[now] <= left]
        if fitting:
            slopes = {tier: (own[tier] - own[now]) / (size[tier] - size[now]) for tier in fitting}
            best = min(fitting, key=slopes.__getitem__)
            heapq.heappush(heap, (slopes[best], unit, best))

    for unit in range(len(errors)):
        offer(unit)
    while heap:
        _, unit, tier = heapq.heappop(heap)
        cost = sizes[unit][tier] - sizes[unit][chosen[unit]]
        if cost <= left:
            chosen[unit], left = tier, left - cost
        offer(unit)
    return chosen


def _tier_errors(layer: ObservedLayer, side: str, config: KVConfig, tiers: list[int], outputs: list[Tensor]) -> Tensor:
    """Return the squared error of the output of attention for each tier and key/value head, fp64 (tiers, heads).

    Levels are fitted for the tier in the middle alone: they hardly depend on it.
    """
    states, weight, mean = layer.side(side, config.dtype)
    natural, width = Channels.natural(*weight.shape).order, weight.shape[1]
    middle = Pattern(tiers[(len(tiers) - 1) // 2], width) if len(tiers) > 1 else None
    channels = fit_channels(states, weight, natural, middle, mean)
    errors = torch.zeros(len(tiers), layer.heads, dtype=torch.float64)
    for place, kept in enumerate(tiers):
        layout = _layout(config, kept, width)
        for probe, output in zip(layer.probes, outputs, strict=True):
            found = attend(probe.call, _pruned(probe, side, channels, layout, layer.skipped))
            squares = (found - output).square().double().sum((0, 2, 3))
            errors[place] += squares.view(layer.heads, -1).sum(1)
    return errors


def _layout(config: KVConfig, kept: int, width: int) -> Layout:
    dtype = stored_type(config.dtype)
    assert dtype is not None
    return Layout(None if kept == width else Pattern(kept, width), dtype, config.recovery == "sign")


def _pruned(probe: Probe, side: str, channels: Channels, layout: Layout, skipped: int) -> Plain:
    """Return the keys and values of a probe, those of one side as they are read when they were packed.

    The first `skipped` tokens and those of the probe's queries stay whole.
    """
    states: Tensor = getattr(probe, side)
    last = states.shape[2] - probe.call.query.shape[2]
    if last <= skipped:
        return Plain(probe.keys, probe.values)
    centred = channels.centred(states[:, :, skipped:last])
    read = decode(encode(centred, channels, layout), channels, layout, states.dtype)
    if channels.mean is not None:
        read = read + channels.mean[:, None]
    pruned = torch.cat((states[:, :, :skipped], read, states[:, :, last:]), 2)
    return Plain(pruned, probe.values) if side == "keys" else Plain(probe.keys, pruned)


def _fitted(layer: ObservedLayer, side: str, config: KVConfig, kept: Tensor) -> Channels:
    """Return the channels of heads of which each keeps its own number, int64 (heads,)."""
    states, weight, mean = layer.side(side, config.dtype)
    order, width = Channels.natural(*weight.shape).order, weight.shape[1]
    level = torch.empty_like(weight)
    for count in kept.unique().tolist():
        own = kept == count
        pattern = pattern_of(DENSE if count == width else f"{count}:{width}", width)
        part = fit_channels(states[own], weight[own], order[own], pattern, None if mean is None else mean[own])
        level[own] = part.level
    return Channels(order, weight, level, mean, kept)
