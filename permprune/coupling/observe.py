"""Find the sites of a model without tracing it, by recording which tensors its linears read in a forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from permprune.coupling.sites import UniqueNames, common_prefix, dotted
from permprune.coupling.space import Coupling, Site
from permprune.errors import PermpruneError
from permprune.models.forward import forward_arguments, inference


def observe(model: nn.Module, example: Mapping[str, Tensor], linears: Sequence[str]) -> Coupling:
    """Find the sites of a model that cannot be traced, by running it on an example batch.

    `linears` are the names of the modules to observe; `example` is passed to the model's forward as keyword arguments.
    Linears that read the same tensor object share a site. The result has no spaces, so every permutation needs a
    gather at run time. Raises `PermpruneError` if the forward pass fails.
    """
    read: list[tuple[str, Tensor]] = []  # keeps the tensors alive, so that no id() is reused

    def note(name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read.append((name, args[0]))

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(note, name)) for name in linears]
    try:
        with inference(model):
            model(**forward_arguments(model, example))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PermpruneError(
            f"the model can be neither traced nor run on the calibration data ({reason}): "
            "raise --memory if it is read layer by layer, else check that it runs"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return Coupling((), tuple(_sites(read)))


def _sites(read: Sequence[tuple[str, Tensor]]) -> list[Site]:
    """Group linears that read a common tensor, directly or through other linears, into one site each, in call order."""
    groups: list[dict[str, Tensor]] = []
    readers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in read:
        readers.setdefault(id(tensor), {})[name] = tensor
    for found in readers.values():
        joined = [group for group in groups if group.keys() & found.keys()]
        merged = {name: tensor for group in [*joined, found] for name, tensor in group.items()}
        groups = [group for group in groups if group not in joined] + [merged]
    names, sites = UniqueNames(), []
    for group in groups:
        weights = tuple(f"{name}.weight" for name in group)
        size = next(iter(group.values())).shape[-1]
        sites.append(Site(names.take(dotted(common_prefix(group), "input")), weights, size, ("input",)))
    return sites
