"""Coupling: which channels of a model must move together, discovered from its graph.

`discover` traces a model and returns its channel spaces and sites, `observe` runs it and returns its sites alone;
`fold` writes a permutation of a space into the parameters; `verify` proves that a space may be permuted.
"""
