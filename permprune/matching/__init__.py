"""Matching: from a matrix of costs to a permutation, soft by Sinkhorn or exact by assignment.

Everywhere here `cost[i, j]` is the cost of matching row i (a channel) with column j (a position), and leading
dimensions are independent problems.
"""
