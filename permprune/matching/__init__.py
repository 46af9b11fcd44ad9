"""Matching: from a cost matrix to a permutation, either relaxed (Sinkhorn) or exact (assignment).

In all functions `cost[i, j]` is the cost of matching row i (a channel) with column j (a position), and leading
dimensions are independent problems.
"""
