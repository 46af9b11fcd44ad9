"""Coupling: discover from a model's graph which channels have to be permuted together.

`discover` traces a model and returns its channel spaces and sites; `observe` runs a model that cannot be traced and
returns only its sites; `fold` applies a permutation of a space to the parameters; `verify` checks numerically that
permuting a space leaves the model's outputs unchanged.
"""
