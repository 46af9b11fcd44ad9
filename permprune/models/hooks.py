"""Hooks on layers, which see what the layers read and compute whenever they run, and on blocks, which change theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from permprune.errors import PermpruneError
from permprune.models.experts import ExpertMatrix, Routed, Whole, run_in_turn
from permprune.models.forward import main_outputs, without_caches
from permprune.models.layers import Layer, block_chains, blocks
from permprune.system.progress import track

Before = Callable[[Layer, Tensor, Routed | None], Tensor | None]
"""Called with (layer, inputs, tokens) before a layer runs; returns the inputs to use instead, or None.

The tokens are those of an expert's inputs, and None for other layers.
"""

After = Callable[[Layer, Tensor, Routed | None, Tensor], None]
"""Called with (layer, inputs, tokens, outputs) after a layer has run."""

Visit = Callable[[list[Layer], "partial[Any]"], None]
"""Called with the layers of a block and its `forward` with the arguments that the pass calls it with."""


@contextmanager
def attached(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Context manager: the hooks are removed at its end."""
    hooks = list(hooks)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def hooked(
    layers: Iterable[Layer], *, before: Before | None = None, after: After | None = None, whole: Whole = ()
) -> Iterator[None]:
    """Context manager: `before` and `after` are called whenever one of the layers runs.

    Experts run one after the other, those in `whole` on all tokens (see `run_in_turn`). With `after`, a layer that
    does not return a tensor raises `PermpruneError`.
    """
    hooks, layers = [], list(layers)
    for layer in layers:
        if before is not None:
            hooks.append(layer.module.register_forward_pre_hook(partial(_before, layer, before)))
        if after is not None:
            hooks.append(layer.module.register_forward_hook(partial(_after, layer, after)))
    experts = [layer.module.experts for layer in layers if isinstance(layer.module, ExpertMatrix)]
    with attached(hooks), run_in_turn(experts, whole):
        yield


def replaced_while_running(
    module: nn.Module, attribute: str, replacement: Callable[[nn.Parameter], Tensor | None]
) -> list[RemovableHandle]:
    """Replace a parameter of a module by another tensor whenever the module runs, until the handles are removed.

    `replacement` is called with the parameter before the module runs; if it returns None, the parameter stays. The
    gradient with respect to the replacement becomes that of the parameter. Copies of the module run with their own
    parameter. Of several replacements the last one is made.
    """
    parameter: nn.Parameter = getattr(module, attribute)

    def enter(running: nn.Module, *_: object) -> None:
        is_original = running is module and module._parameters[attribute] is parameter
        tensor = replacement(parameter) if is_original else None
        if tensor is not None:
            if torch.is_grad_enabled():
                tensor = _InPlaceOf.apply(parameter, tensor)  # type: ignore[no-untyped-call]
            module._parameters[attribute] = tensor  # type: ignore[assignment]

    def leave(running: nn.Module, *_: object) -> None:
        if running is module:
            module._parameters[attribute] = parameter

    before = module.register_forward_pre_hook(enter, prepend=True)
    return [before, module.register_forward_hook(leave, always_call=True), _PutBack(module, attribute, parameter)]


class _PutBack(RemovableHandle):
    """A handle whose removal puts a parameter back: hooks that are always called are not if Ctrl-C ends a pass."""

    def __init__(self, module: nn.Module, attribute: str, parameter: nn.Parameter) -> None:
        super().__init__(module._forward_hooks)
        self._module, self._attribute, self._parameter = module, attribute, parameter

    def remove(self) -> None:
        if not isinstance(self._module._parameters[self._attribute], nn.Parameter):
            self._module._parameters[self._attribute] = self._parameter


class _InPlaceOf(torch.autograd.Function):
    """Returns its second argument; the gradient goes to the first, in that one's type."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, tensor: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


def _before(layer: Layer, call: Before, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    inputs = call(layer, args[0], _routed(layer, args))
    return None if inputs is None else (inputs, *args[1:])


def _after(layer: Layer, call: After, module: nn.Module, args: tuple[Any, ...], outputs: Tensor) -> None:
    if not isinstance(outputs, Tensor):
        kind = type(module).__name__
        raise PermpruneError(f"{layer.name} is a {kind}, which returns more than a linear layer: exclude it")
    call(layer, args[0], _routed(layer, args), outputs)


def _routed(layer: Layer, args: tuple[Any, ...]) -> Routed | None:
    return None if layer.expert is None else args[1]


@contextmanager
def block_by_block(model: nn.Module, layers: Iterable[Layer], visit: Visit, name: str) -> Iterator[None]:
    """Context manager: a forward pass calls `visit` before each block first runs, and ends after the last of them.

    The block then runs as `visit` left it, so that the next one reads what it computes (see `layers_by_block`).
    """
    waiting = layers_by_block(model, layers)
    bar = track(list(waiting), name)

    def reach(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layers_of_block = waiting.pop(block, None)
        if layers_of_block is None:  # a block that runs again
            return
        next(bar)
        visit(layers_of_block, partial(block.forward, *args, **kwargs))  # calling `block` would run this hook again
        if not waiting:
            raise Done

    hooks = [block.register_forward_pre_hook(reach, with_kwargs=True) for block in waiting]
    with attached(hooks), closing(bar), suppress(Done):
        yield


class Done(Exception):
    """Ends a forward pass when the last block was visited or has run, or the last problem is solved."""


@contextmanager
def computing(functions: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Context manager: each of these modules computes a function in place of its `forward`."""
    before = {module: vars(module).get("forward") for module in functions}
    for module, function in functions.items():
        module.forward = function
    try:
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


@contextmanager
def resumed(reached: Sequence[nn.Module], outputs: dict[nn.Module, Any]) -> Iterator[None]:
    """Context manager: a forward pass goes on from the blocks that have `outputs`, and ends after those `reached`.

    `outputs` are of earlier passes on the same inputs. All blocks in `reached` get that of the last one: each must read
    the one before it, and no other of its list. If none are given, the pass does not end.
    """

    def leave(_block: nn.Module, _args: Any, output: Any) -> None:
        outputs.update(dict.fromkeys(reached, output))
        raise Done

    known = {block: partial(_known, output) for block, output in outputs.items()}
    with computing(known), attached(one.register_forward_hook(leave) for one in reached[-1:]), suppress(Done):
        yield


def up_to_each(model: nn.Module) -> list[list[nn.Module]]:
    """For each block of a model, in order, those of its list up to it: what `resumed` takes as `reached`."""
    return [chain[:number] for chain in block_chains(model) for number in range(1, len(chain) + 1)]


def layers_up_to_each(model: nn.Module, layers: Iterable[Layer]) -> list[tuple[list[nn.Module], list[Layer]]]:
    """For each block that has any of the layers: what `resumed` takes as `reached`, and its layers."""
    by_block = layers_by_block(model, layers)
    return [(reached, by_block[reached[-1]]) for reached in up_to_each(model) if reached[-1] in by_block]


@torch.no_grad()
def continues(model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Whether passes that go on from one block to the next (`resumed`) compute the same of `inputs` as a whole one.

    These should be short (`short_inputs`): what each pass computes is held, with a language model's logits.
    """

    def compute() -> list[Tensor]:
        return [output for output in main_outputs(model(**inputs)) if torch.is_tensor(output)]

    every, outputs = up_to_each(model), dict[nn.Module, Any]()
    try:
        with without_caches(model):
            whole = compute()
            for reached in every:
                with resumed(reached, outputs):
                    compute()
            again: list[Tensor] = []
            with resumed((), outputs):
                again = compute()
        return bool(every and whole) and len(again) == len(whole) and all(map(torch.equal, again, whole))
    except Exception:  # a model's own code can raise any type
        return False


def _known(output: Any, *_: Any, **__: Any) -> Any:
    return output


def layers_by_block(model: nn.Module, layers: Iterable[Layer]) -> dict[nn.Module, list[Layer]]:
    """Return the layers of each block; those of a module that blocks share belong to the first."""
    block_of = {module: block for block in reversed(blocks(model)) for module in block.modules()}
    by_block: dict[nn.Module, list[Layer]] = {}
    for layer in layers:
        if layer.owner in block_of:
            by_block.setdefault(block_of[layer.owner], []).append(layer)
    return by_block
