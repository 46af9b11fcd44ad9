"""Matching: from a matrix of costs to a permutation, soft by Sinkhorn or exact by assignment.

Everywhere here `cost[i, j]` is the cost of matching row i (a channel) with column j (a position), and leading
dimensions are independent problems.
"""

from permprune.matching.assignment import assign, cycles
from permprune.matching.pairs import pair_up
from permprune.matching.relaxation import annealed_soft, gumbel_noise, straight_through
from permprune.matching.schedule import Constant, Cosine, Epsilon, Geometric
from permprune.matching.sinkhorn import Plan, sinkhorn

__all__ = [
    "Constant",
    "Cosine",
    "Epsilon",
    "Geometric",
    "Plan",
    "annealed_soft",
    "assign",
    "cycles",
    "gumbel_noise",
    "pair_up",
    "sinkhorn",
    "straight_through",
]
