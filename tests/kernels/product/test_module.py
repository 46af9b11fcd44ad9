"""A packed layer follows its tensors, however they are changed, and is trained through."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.kernels.product.linear import multiply_reference
from permprune.kernels.product.module import PackedLinear
from permprune.pattern import Pattern
from tests.kernels.product.weights import packed, sparse

ROWS, WIDTH = 24, 128


def layer(dtype: torch.dtype = torch.float32, seed: int = 0) -> PackedLinear:
    """A packed layer with bias and order, which has computed a product."""
    dense = nn.Linear(WIDTH, ROWS)
    dense.weight.data = sparse(ROWS, WIDTH, Pattern(2, 4), seed)
    made = PackedLinear.pack(dense, Pattern(2, 4), dtype, torch.randperm(WIDTH))
    made(torch.randn(1, WIDTH))
    return made


def assert_follows(changed: PackedLinear) -> None:
    x = torch.randn(3, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(changed(x), multiply_reference(changed.packed, x, changed.bias, changed.order))


def in_place(change: Callable[[PackedLinear], object]) -> Callable[[PackedLinear], PackedLinear]:
    def apply(own: PackedLinear) -> PackedLinear:
        change(own)
        return own

    return apply


CHANGES: dict[str, Callable[[PackedLinear], PackedLinear]] = {
    "to fp16, then bf16": in_place(lambda own: own.to(torch.float16).to(torch.bfloat16)),
    "half": in_place(lambda own: own.half()),
    "_apply": in_place(lambda own: own._apply(lambda tensor: tensor.clone())),
    "a copy": copy.copy,
    "a deep copy": copy.deepcopy,
    "a pickle": lambda own: pickle.loads(pickle.dumps(own)),
    "a state that is copied": in_place(lambda own: own.load_state_dict(layer(seed=1).state_dict())),
    "a state that is assigned": in_place(lambda own: own.load_state_dict(layer(seed=1).state_dict(), assign=True)),
    "blocks": in_place(lambda own: setattr(own, "blocks", packed(ROWS, WIDTH).blocks)),
    "blocks in place": in_place(lambda own: own.packed.values.mul_(2)),
    "fewer blocks": in_place(lambda own: (own.blocks.resize_(3, own.blocks.shape[1]), setattr(own, "bias", None))),
    "no bias": in_place(lambda own: setattr(own, "bias", None)),
    "a bias": in_place(lambda own: setattr(own, "bias", nn.Parameter(torch.randn(ROWS).half(), False))),
    "the data of a bias": in_place(lambda own: setattr(own.bias, "data", torch.randn(ROWS).bfloat16())),
    "an order": in_place(lambda own: setattr(own, "order", torch.arange(WIDTH))),
    "no order": in_place(lambda own: setattr(own, "order", None)),
    "the order's data": in_place(lambda own: own.order.copy_(torch.arange(WIDTH))),  # type: ignore[union-attr]
    "a layout": in_place(lambda own: vars(own).update(vars(layer(torch.bfloat16)))),
    "swapped tensors": in_place(
        lambda own: torch.utils.swap_tensors(own.bias, nn.Parameter(torch.randn(ROWS).bfloat16(), False))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_follows_its_tensors(kernel: str, change: str) -> None:
    assert_follows(CHANGES[change](layer()))


def test_a_bias_of_another_type_in_the_same_memory() -> None:
    """As after two conversions without a product between them, where the second reuses the memory of the first."""
    room, own = torch.randn(ROWS), layer()
    assert own.bias is not None
    own.bias.data = room
    assert_follows(own)
    halves = torch.randn(ROWS).bfloat16()
    room.view(torch.bfloat16)[:ROWS] = halves
    own.bias.data = room.view(torch.bfloat16)[:ROWS]
    assert own.bias.data_ptr() == room.data_ptr()
    assert_follows(own)


def test_tensors_that_do_not_fit_are_refused() -> None:
    own = layer()
    own.order.resize_(WIDTH // 2)  # type: ignore[union-attr]
    with pytest.raises(PermpruneError, match="order of shape"):
        own(torch.randn(1, WIDTH))
    own = layer()
    own.double()
    with pytest.raises(PermpruneError, match="bias of shape"):
        own(torch.randn(1, WIDTH))


class Adapted(nn.Module):
    """A layer with a low-rank adapter, as LoRA has it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, ROWS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


def in_natural_order(own: PackedLinear) -> nn.Module:
    """The dense layer, whose columns are in the order of the channels that it reads."""
    dense = own.dense(torch.float32)
    assert isinstance(dense, nn.Linear) and own.order is not None
    dense.weight.data = dense.weight.data[:, own.order.argsort()]
    return dense


def test_a_traced_layer_computes_what_it_is_given() -> None:
    layer = PackedLinear(packed(8, 64))
    with torch.inference_mode():
        layer(torch.randn(3, 64))  # what describes the weight to the library is kept
    with torch.no_grad(), pytest.deprecated_call():
        traced = torch.jit.trace(layer, torch.randn(3, 64), check_trace=False)  # type: ignore[no-untyped-call]
    x = torch.randn(3, 64)
    assert torch.equal(traced(x), layer(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_adapters_are_trained_through_packed_layers(kernel: str, compiled: bool) -> None:
    first, second = layer(), layer(seed=1)
    packed_model, dense_model = (
        nn.Sequential(Adapted(one), nn.GELU(), nn.Linear(ROWS, WIDTH), Adapted(two))
        for one, two in ((first, second), (in_natural_order(first), in_natural_order(second)))
    )
    dense_model.load_state_dict(packed_model.state_dict(), strict=False)
    x = torch.randn(5, WIDTH)
    run = torch.compile(packed_model, backend="aot_eager", fullgraph=True) if compiled else packed_model
    run(x).square().mean().backward()
    dense_model(x).square().mean().backward()
    expected = dict(dense_model.named_parameters())
    for name, parameter in packed_model.named_parameters():
        assert (parameter.grad is None) == (name in ("0.base.bias", "3.base.bias"))
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-3)
