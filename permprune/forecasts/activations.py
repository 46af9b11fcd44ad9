"""The memory of activations, counted on fake tensors: the model runs without data, and nothing is computed."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop
from transformers import masking_utils

from permprune.forecasts.resources import Memory, Part
from permprune.models.activation_checkpointing import recomputed
from permprune.models.experts import EVENLY, implementation
from permprune.models.forward import frozen, without_hub_kernels
from permprune.models.hooks import attached
from permprune.models.layers import block_linears, blocks
from permprune.models.narrow_weights import NarrowWeights, holdable_ends
from permprune.models.shallow import Repetition, shortened

CPU = torch.device("cpu")
"""The device of the fake tensors: its kernels for attention keep as much as those of GPUs."""

OPERATIONS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
"""The floating-point operations of products, convolutions and attention, by operator."""

Gradients = Literal["none", "inputs", "weights"]
"""The tensors with gradients in a pass: none (there is no backward pass), the layers' inputs, or their weights too."""


@dataclass(frozen=True)
class Activations:
    """Bytes of the tensors that live at the peak of a pass over one batch, and the operations of the pass.

    `logits` are those of the model's head and the loss, if the peak is there, and `blocks` all others. `positions` is
    the number of positions, such as tokens, of all examples together that a linear layer reads: the mean by the squares
    of their widths, by which the work on second moments goes. `outputs` are the bytes of the outputs of all blocks.
    `operations` are floating-point operations of products, convolutions and attention (`OPERATIONS`), forward and, with
    gradients, backward, and `moved` the bytes that all other operations read and write.
    """

    blocks: int
    logits: int
    positions: int
    outputs: int
    operations: float = 0.0
    moved: float = 0.0

    @property
    def parts(self) -> tuple[Memory, ...]:
        """The parts of a stage that holds these activations."""
        return Memory(Part.ACTIVATIONS, self.blocks), Memory(Part.LOGITS, self.logits)


def count_activations(
    model: nn.Module,
    run: Callable[[nn.Module], Tensor],
    *,
    gradients: Gradients,
    dtype: torch.dtype,
    recompute: bool = False,
    lists: Sequence[Repetition] = (),
    held: torch.dtype = torch.float32,
    ends: torch.dtype = torch.float32,
) -> Activations:
    """Count what a pass of a model makes and computes; the model, which may be on the meta device, is not changed.

    `run(model)` makes a batch on the CPU, runs the model on it and returns the loss, or any output if there is no
    backward pass. Weights are fp32, those of the layers have type `held`, and the embedding table and the output layer
    type `ends` if they can be held so (`NarrowWeights`). They are not part of the result, nor are their gradients, but
    copies of them in the `dtype` of the activations are. Blocks that `lists` leaves out do not run: each counts as the
    one that it equals. Tokens are spread evenly over experts.
    """
    with shortened(model, lists), without_hub_kernels(model):
        parameters = {id(one): nn.Parameter(one.detach().to("meta"), one.requires_grad) for one in model.parameters()}
        fake = copy.deepcopy(model, {**parameters, **{id(one): one.to("meta") for one in model.buffers()}})
    with frozen(fake), implementation(EVENLY, fake.modules()), _without_packed_sequences():
        mode = FakeTensorMode()
        layers = block_linears(fake)
        types = {id(end): ends for end in holdable_ends(fake)} | {id(layer.stored): held for layer in layers}
        _make_fake(fake, mode, types)
        narrow = NarrowWeights.as_read(fake) if ends == torch.bfloat16 else None  # its hooks last as long as it
        if gradients == "weights":
            for stored in {id(layer.stored): layer.stored for layer in layers}.values():
                stored.requires_grad_(True).register_post_accumulate_grad_hook(_drop_gradient)
        live = _Live(fake)
        with (
            mode,
            live,
            torch.set_grad_enabled(gradients != "none"),
            recomputed(fake, recompute),
            live.watching({layer.owner for layer in layers}, gradients == "inputs"),
        ):
            # masked weights are no leaves of the graph, of which alone autocast keeps copies for further use
            with torch.autocast(CPU.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
                loss = run(fake)
            if gradients != "none":
                loss.backward()
        del narrow
        live.leave_head()
        copies = [fake.get_submodule(f"{one.name}.{equal}") for one in lists for equal in one.equals]
        growth, outputs = (sum(sizes.get(block, 0) for block in copies) for sizes in (live.growth, live.outputs))
        passes = 1 if gradients == "none" else 4 if recompute else 3
        operations, moved = (
            total + passes * sum(each.get(block, 0.0) for block in copies)
            for total, each in ((live.operations, live.computed), (live.moved, live.moved_by))
        )
    logits = live.head - live.before_head if live.head == live.peak else 0
    return Activations(
        blocks=live.peak - logits + growth,
        logits=logits,
        positions=live.positions,
        outputs=sum(live.outputs.values()) + outputs,
        operations=operations,
        moved=moved,
    )


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operations inside make and that are alive, without those of the model.

    `now` are the bytes at present and `peak` the most so far. `growth` are the bytes that remain of each block after it
    has run forward, and `outputs` those of its output. `operations` and `moved` are as in `Activations`; `computed` and
    `moved_by` are those of each block forward. `head` is the peak from the end of the last block until its output has a
    gradient, and `before_head` are the bytes at its beginning. `positions` is as in `Activations`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.blocks, self.growth, self.outputs = blocks(model), dict[nn.Module, int](), dict[nn.Module, int]()
        self.operations, self.computed = 0.0, dict[nn.Module, float]()
        self.moved, self.moved_by = 0.0, dict[nn.Module, float]()
        self._own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self.now = self.peak = self.head = self.before_head = 0
        self._squares = self._read = 0
        self._sizes: dict[int, int] = {}
        self._left: nn.Module | None = None
        self._peak_before: int | None = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._end_block()
        result = function(*args, **(kwargs or {}))
        written = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        made = any([self._add(tensor.untyped_storage()) for tensor in written])
        if (count := OPERATIONS.get(function._overloadpacket)) is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=result)
        elif made or function._schema.is_mutable:  # others are views
            tensors = [*written, *(one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor))]
            self.moved += sum(one.nbytes for one in tensors if one.untyped_storage()._cdata not in self._own)
        return result

    def _add(self, storage: torch.UntypedStorage) -> bool:
        """Count a storage, unless it is known; returns whether it is new."""
        if storage._cdata in self._sizes or storage._cdata in self._own:
            return False
        self._sizes[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._drop, storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return True

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    @property
    def positions(self) -> int:
        """As in `Activations`."""
        return round(self._read / max(1, self._squares))

    @contextmanager
    def watching(self, layers: Set[nn.Module], starts_graph: bool) -> Iterator[None]:
        """A context that follows the blocks. The graph may start at the input of the first linear layer that runs."""
        first: list[nn.Module] = []

        def read(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x = args[0]
            self._squares += x.shape[-1] ** 2
            self._read += x.shape[-1] * x.numel()
            if module not in (first or [module]):
                return None
            first[:] = [module]
            begins = starts_graph and not x.requires_grad and torch.is_grad_enabled()
            return (x.detach().requires_grad_(), *args[1:]) if begins else None

        hooks = [hook for block in self.blocks for hook in self._watch(block)]
        with attached([*hooks, *(layer.register_forward_pre_hook(read) for layer in layers)]):
            yield

    def _watch(self, block: nn.Module) -> list[Any]:
        def enter(_block: nn.Module, _args: Any) -> None:
            self._end_block()
            self.leave_head()  # operations between two blocks are not part of the head
            self.growth[block], self.computed[block], self.moved_by[block] = -self.now, -self.operations, -self.moved

        def leave(_block: nn.Module, _args: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            self._left, self.outputs[block] = block, first.nbytes
            self.computed[block] += self.operations
            self.moved_by[block] += self.moved
            if first.requires_grad and block is self.blocks[-1]:
                first.register_hook(lambda _gradient: self.leave_head())

        return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]

    def _end_block(self) -> None:
        """Measure what remains of a block that has ended, now that its caller holds the output and not the input."""
        if self._left is not None:
            self.growth[self._left] += self.now
            self._peak_before, self.before_head, self.peak = self.peak, self.now, self.now
            self._left = None

    def leave_head(self) -> None:
        """End the part of the pass that counts as the head, if it has begun."""
        if self._peak_before is not None:
            self.head, self.peak, self._peak_before = self.peak, max(self.peak, self._peak_before), None


@contextmanager
def _without_packed_sequences() -> Iterator[None]:
    """A context in which Transformers treats each row of position ids as one sequence.

    It looks for several sequences in a row. Without data it cannot tell, and would make a mask of all pairs of
    positions.
    """
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None


def _make_fake(model: nn.Module, mode: FakeTensorMode, types: Mapping[int, torch.dtype]) -> None:
    """Replace the parameters and buffers of a model on the meta device by fake ones.

    Floating types become fp32, and those of the parameters in `types`, by `id`, the one that it names.
    """
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            dtype = types.get(id(tensor), torch.float32) if tensor.is_floating_point() else tensor.dtype
            whole = tensor.detach().to("meta", dtype)
            made[id(tensor)] = FakeTensor(mode, whole, CPU)
        return made[id(tensor)]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                replacement = fake(parameter)
                made[id(parameter)] = module._parameters[name] = (
                    replacement
                    if isinstance(replacement, nn.Parameter)
                    else nn.Parameter(replacement, requires_grad=False)
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
