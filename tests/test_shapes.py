"""That the shapes which functions declare are checked in tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import permprune
from permprune.matching.sinkhorn import sinkhorn
from permprune.pattern import Pattern
from permprune.permuters.learned import assign
from permprune.saliency.metrics import Wanda

from .shapes import MODULES


@pytest.mark.parametrize(
    "call",
    [
        lambda: sinkhorn(torch.zeros(3, 4), 1.0),
        lambda: assign(torch.zeros(3)),
        lambda: Pattern(2, 4).mask_in_order(torch.rand(2, 8), torch.arange(4)),
        lambda: Wanda().score(torch.rand(2, 8), torch.eye(4)),
    ],
)
def test_tensors_of_other_shapes_are_seen(call: Callable[[], object]) -> None:
    with pytest.raises(TypeCheckError):
        call()


def test_every_module_that_declares_shapes_is_checked() -> None:
    root = Path(permprune.__file__).parent
    declaring = {path for path in root.rglob("*.py") if "from jaxtyping import" in path.read_text()}
    assert declaring == {root.joinpath(*name.split(".")[1:]).with_suffix(".py") for name in MODULES}
