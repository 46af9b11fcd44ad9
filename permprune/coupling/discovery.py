"""Discover the channel spaces and sites of a model from an example batch, or its sites alone by running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from permprune.coupling.build import build_spaces
from permprune.coupling.sites import common_prefix, connected, dotted, find_sites, owner, unique
from permprune.coupling.space import Coupling, Site
from permprune.coupling.trace import trace
from permprune.errors import PermpruneError, first_line
from permprune.models.forward import forward_arguments, inference
from permprune.models.hooks import attached
from permprune.models.layers import Layer
from permprune.system.failures import failures_reported


@failures_reported()
def discover(model: nn.Module, example: Mapping[str, Tensor]) -> Coupling:
    """Trace a model and return its channel spaces and sites.

    `example` is a small batch, passed to the model's forward as keyword arguments. Only the code that runs on this
    batch is analyzed, so it should contain every kind of input that the model will receive. Raises `Untraceable`, a
    `PermpruneError`, if `torch.export` cannot trace the model.
    """
    walk, graph = trace(model, example)
    sites, readers = find_sites(model, walk, graph)
    return Coupling(build_spaces(walk, readers), sites)


def observe(model: nn.Module, example: Mapping[str, Tensor], layers: Sequence[Layer]) -> Coupling:
    """Find the sites of a model that cannot be traced, by running it on an example batch.

    `layers` are the layers to observe; `example` is passed to the model's forward as keyword arguments. Layers that
    read the same tensor object share a site; all experts of a layer read one. The result has no spaces, so every
    permutation needs a gather at run time. Raises `PermpruneError` if the forward pass fails.
    """
    read: list[tuple[str, Tensor]] = []  # tensors are equal if they are the same object

    def note(layer: Layer, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inside = args[0].new_empty(0, layer.weight.shape[1])  # what an expert computes is read by nothing else
        read.append((layer.parameter, args[0] if layer.reads_input else inside))

    observed = {layer.parameter: layer for layer in layers}.values()
    try:
        with (
            attached(layer.owner.register_forward_pre_hook(partial(note, layer)) for layer in observed),
            inference(model),
        ):
            model(**forward_arguments(model, example))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        raise PermpruneError(
            f"the model can be neither traced nor run on the calibration data ({first_line(error)}): check that it runs"
        ) from error
    names, sites = Counter[str](), []
    for group in connected(read):
        weights = tuple(dict.fromkeys(weight for weight, _ in group))
        name = unique(dotted(common_prefix(map(owner, weights)), "input"), names)
        sites.append(Site(name, weights, group[0][1].shape[-1], ("input",)))
    return Coupling((), tuple(sites))
