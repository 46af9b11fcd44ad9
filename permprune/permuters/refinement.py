"""Refinement of masks: which members of a group stay in each row, by the gradient of the network's own loss.

An order decides which channels form a group, and the saliency which of them each row keeps. Of the weights that it
prunes, a few matter far more to the loss than their score says. A swap exchanges a kept weight k for a pruned one p of
the same row and group. Its predicted change of the loss is that of `quadratic`, for one row and two channels:

    dLoss = g_p w_p - g_k w_k + damping / 2 * fisher_r * (H_kk w_k^2 + H_pp w_p^2 - 2 H_kp w_k w_p)

with g the gradient of the loss with respect to the masked weights. The gradient's own error is known: over t terms, the
variance of the linear part is fisher_r * (...) / t. Only swaps whose linear part exceeds that error several times over
are considered, of which those with the largest predicted gain are made, as many as lower the loss on held-out text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels.search.masks import pack_mask, write_mask
from permprune.pattern import Pattern
from permprune.permuters.iterate import Landscape, S
from permprune.permuters.tuning import keep_if_better
from permprune.pruning.gradients import Gradients
from permprune.pruning.network import PrunedNetwork
from permprune.system import distributed
from permprune.system.progress import log, track
from permprune.system.search_state import Resumable
from permprune.updates.methods import ADMM

DAMPING = 1500.0
"""The damping of the first round: the swaps of a round are thousands, in all layers, and act together. It is divided by
`EASING` after a round of which the whole step was kept, and multiplied by it after one that was rejected."""

EASING = 4.0

SIGNIFICANT = 3.0
"""How many standard errors of the gradient the linear part of a swap must exceed."""

SHARE = 0.25
"""Where fewer swaps may lower the loss further, those of this share with the largest gains are tried next."""

TRIED = 5
"""The largest number of shares that are tried."""

GROUPS_AT_ONCE = 2**20
"""The number of groups, of all rows, whose swaps are compared at a time."""


@dataclass(frozen=True)
class Swaps:
    """Swaps in a layer: the positions of the weights that go and come, in the flattened weight, and predicted changes.

    All are (count,); at most one swap for each row of each group.
    """

    kept: Tensor
    pruned: Tensor
    change: Tensor


def require_single_weights(patterns: Iterable[Pattern]) -> None:
    """Raise `PermpruneError` for a pattern whose masks cannot be refined."""
    for pattern in patterns:
        if pattern.unit > 1:
            raise PermpruneError(f"refine chooses single weights, and {pattern} keeps pairs: leave refine out")


def find_swaps(network: PrunedNetwork, name: str, gradients: Gradients, damping: float) -> Swaps:
    """Return the significant swaps of a layer that are predicted to lower the loss, the best of each row of a group."""
    weight, mask, pattern = network.weights[name], network.masks[name], network.patterns[name]
    moments = network.statistics.moments[network.sites[name]]
    columns = network.stored_columns()[name].view(-1, pattern.m).to(moments.device)
    energy = moments[columns[:, :, None], columns[:, None, :]].to(weight.device)  # of each group
    columns = columns.to(weight.device)
    gradient, swaps = gradients.weight[name].flatten(), []
    for rows in torch.arange(len(weight), device=weight.device).split(max(1, GROUPS_AT_ONCE // len(columns))):
        members = mask[rows][:, columns].to(torch.int8).argsort(dim=-1, descending=True, stable=True)  # kept ones first
        places = (rows[:, None, None] * weight.shape[1] + columns).gather(-1, members)
        values = weight.flatten()[places].float()
        slope = gradient[places].float() * values
        fisher = gradients.fisher[name][rows, None].float()
        pair, change = _best_pairs(
            values, slope, members, energy, n=pattern.n, fisher=fisher, damping=damping, terms=gradients.count
        )
        gaining = (change < 0).nonzero(as_tuple=True)
        kept, pruned = pair[gaining].unbind(1)
        swaps.append((places[(*gaining, kept)], places[(*gaining, pruned)], change[gaining]))
    return Swaps(*(torch.cat(blocks) for blocks in zip(*swaps, strict=True)))


def _best_pairs(
    weight: Tensor,
    slope: Tensor,
    members: Tensor,
    energy: Tensor,
    *,
    n: int,
    fisher: Tensor,
    damping: float,
    terms: int,
) -> tuple[Tensor, Tensor]:
    """Return the best swap of each row of a group: which members, (rows, groups, 2), and the change of the loss.

    A change of 0 stands for no swap. `weight`, `slope` (gradient times weight) and `members` (positions in a group) are
    (rows, groups, m), with the `n` kept members first; `energy`, (groups, m, m), are a group's second moments.
    """
    group = torch.arange(len(energy), device=energy.device).expand(weight.shape[:2])
    best = weight.new_zeros(weight.shape[:2])
    one, other = (members.new_zeros(weight.shape[:2]) for _ in range(2))
    for k, p in itertools.product(range(n), range(n, weight.shape[-1])):
        step = torch.stack([-weight[..., k], weight[..., p]], -1)
        pair = torch.stack([members[..., k], members[..., p]], -1)
        moments = energy[group[..., None, None], pair[..., None], pair[..., None, :]]
        curvature = fisher * torch.einsum("rgi,rgij,rgj->rg", step, moments, step).clamp_min(0)
        linear = slope[..., p] - slope[..., k]
        change = linear + damping / 2 * curvature
        better = (change < best) & (linear < -SIGNIFICANT * (curvature / terms).sqrt())
        best = torch.where(better, change, best)
        one, other = one.masked_fill(better, k), other.masked_fill(better, p)
    return torch.stack([one, other], -1), best


def all_swaps(network: PrunedNetwork, gradients: Gradients, damping: float) -> dict[str, Swaps]:
    """Return `find_swaps` of every layer, by name."""
    names = list(network.layers)
    swaps = distributed.each(lambda name: find_swaps(network, name, gradients, damping), names, network.device)
    return dict(zip(names, swaps, strict=True))


def swapped(network: PrunedNetwork, swaps: dict[str, Swaps], least: float) -> dict[str, Tensor]:
    """Return the network's masks, packed, after the swaps whose predicted change is at most `least`."""
    bits = network.bits
    for name, of_layer in swaps.items():
        chosen = of_layer.change <= least
        if chosen.any():
            mask = network.masks[name]
            mask.view(-1)[of_layer.kept[chosen]] = False
            mask.view(-1)[of_layer.pruned[chosen]] = True
            bits[name] = pack_mask(mask)
    return bits


def refine_masks(landscape: Landscape, state: S, *, rounds: int, examples: int, limit: float, saved: Resumable) -> S:
    """Refine the masks of a network, which shows `state`, until the search has taken `limit` seconds.

    Round i takes its gradient on batch i of `examples` training examples. A round without a gain changes nothing.
    Progress is saved in `saved` after each round, and refinement continues from the progress found there, unless it has
    more rounds. Returns the state with the loss and the seconds after each round.
    """
    network, before = landscape.network, state.seconds

    def record(state: S, loss: float, seconds: float) -> S:
        return replace(state, seconds=before + seconds).record(loss, loss < state.best, "refinement", best=loss)

    damping, made = DAMPING, list[tuple[float, float]]()
    bits, values = saved.take() or ({}, {"done": []})
    if 0 < len(values["done"]) <= rounds:
        network.set_bits(bits)
        damping, made = values["damping"], [(loss, seconds) for loss, seconds in values["done"]]
        for loss, seconds in made:
            state = record(state, loss, seconds)
    for number in track(range(len(made), rounds), "refining masks"):
        if state.seconds > limit:
            log.warning("refinement: no time is left of --minutes for %d of %d rounds", rounds - number, rounds)
            break
        gradients = landscape.gradients(number, examples)
        with torch.no_grad():
            swaps = all_swaps(network, gradients, damping)
        del gradients
        share, loss = _try_shares(landscape, swaps, state.best)
        count = round(share * sum(len(of_layer.change) for of_layer in swaps.values()))
        log.info("refinement %d: held-out loss %.4f after %d swaps", number, loss, count)
        damping = damping / EASING if share == 1 else damping * EASING if share == 0 else damping
        made.append((loss, distributed.mean(saved.seconds)))
        state = record(state, *made[-1])
        saved.save(lambda damping=damping: (network.bits, {"damping": damping, "done": made}))  # type: ignore[misc]
    return state


def _try_shares(landscape: Landscape, swaps: dict[str, Swaps], best: float) -> tuple[float, float]:
    """Make the share of the swaps that lowers the loss most; returns the share, which may be 0, and the loss."""
    changes = torch.cat([of_layer.change for of_layer in swaps.values()]).sort().values
    network = landscape.network
    before, chosen, kept, share = network.bits, network.bits, 0.0, 1.0
    for _ in range(TRIED if len(changes) else 0):
        network.set_bits(before)
        network.set_bits(swapped(network, swaps, float(changes[max(0, round(share * len(changes)) - 1)])))
        if (loss := landscape.held_out_loss()) < best:
            best, chosen, kept = loss, network.bits, share
        elif kept:
            break
        share *= SHARE
    network.set_bits(chosen)
    return kept, best


def compensate(landscape: Landscape, state: S, *, examples: int, limit: float, saved: Resumable) -> S:
    """Compensate with `ADMM` for the pruned weights of a network, which shows `state`, if the held-out loss falls.

    The second moments are those of `examples` training examples. Progress is saved in `saved` after each block, and
    blocks that are not reached in `limit` seconds stay as they are. Returns the state with the loss on its curve and,
    if it fell, the new weights; the network then shows these, and keeps the masks that were chosen.
    """
    network = landscape.network
    before = network.bits
    with torch.no_grad(), network.shelf.room.without_reserved():
        ADMM().run(network, landscape.run.batch(0, examples), saved=saved, limit=limit)
        updated, kept = network.updated, network.shelf.another()
        network.set_bits(before | _bits_of(network, updated))  # `updated` is not shown any more
        for name in [*updated]:  # pruned weights keep the values that they had, as in training
            dtype = network.layers[name].stored.dtype
            kept[name] = torch.where(network.masks[name], updated.pop(name), network.weights[name]).to(dtype)
        kept.update((name, network.trained[name]) for name in network.trained if name not in kept)
    state, better = keep_if_better(landscape, state, kept, "compensation")
    if not better:
        network.set_bits(before)
    return state


def _bits_of(network: PrunedNetwork, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of pruned weights, packed; each group keeps its N largest weights, of which some may be 0."""
    columns, bits = network.stored_columns(), {}
    for name, weight in weights.items():
        mask = torch.zeros_like(weight, dtype=torch.bool)
        write_mask(mask, weight.abs(), columns[name], network.patterns[name])
        bits[name] = pack_mask(mask)
    return bits
