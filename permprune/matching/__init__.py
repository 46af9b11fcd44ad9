"""Matching: from a matrix of costs to a permutation, soft by Sinkhorn or exact by assignment.

Everywhere here `cost[i, j]` is the cost of matching row i (a channel) with column j (a position), and leading
dimensions are independent problems.
"""

from permprune.matching.assignment import assign, cycles
from permprune.matching.pairs import pair_up
from permprune.matching.relaxation import gumbel_noise, straight_through
from permprune.matching.schedule import Cosine, Epsilon, Geometric
from permprune.matching.sinkhorn import sinkhorn

__all__ = [
    "Cosine",
    "Epsilon",
    "Geometric",
    "assign",
    "cycles",
    "gumbel_noise",
    "pair_up",
    "sinkhorn",
    "straight_through",
]
