"""The language in which methods are named."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from permprune import LocalPermuter, Newton, Objective, PermpruneError
from permprune.permuters.base import Identity
from permprune.permuters.kept import RIAPermuter
from permprune.permuters.registry import PERMUTERS, permuter
from permprune.pruning.network import PrunedNetwork
from permprune.pruning.problem import Problem
from permprune.registry import describe
from permprune.saliency.metrics import SALIENCIES, Wanda, saliency
from permprune.updates.methods import UPDATES, update

MAKERS: list[tuple[Any, dict[str, Any]]] = [(permuter, PERMUTERS), (saliency, SALIENCIES), (update, UPDATES)]


@dataclass(frozen=True)
class Mine(LocalPermuter):
    """Another's orders."""

    name: ClassVar[str] = "mine"
    start: Any = RIAPermuter()
    depth: int = 2

    def order(self, network: PrunedNetwork, problem: Problem, generator: torch.Generator) -> Tensor:
        return problem.identity()


@pytest.mark.parametrize(("make", "known"), MAKERS, ids=["permuter", "saliency", "update"])
def test_every_method_goes_by_its_name(make: Any, known: dict[str, Any]) -> None:
    for name, kind in known.items():
        assert make(name) == kind() and describe(make(name)) == name
        assert make(kind()) == kind()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (permuter, "newton:rounds=6"),
        (permuter, "newton:rounds=6:damping=3.5:distillation=1e-05"),
        (permuter, "newton:start=ria:rounds=0"),
        (permuter, "cp:escapes=3"),
        (saliency, "ria:power=1.0"),
        (saliency, "obs:damping=0.1"),
        (update, "sparsegpt:damping=0.1:block=64"),
        (update, "admm:iterations=50:gradual=0"),
    ],
)
def test_options_are_read_and_described(make: Any, name: str) -> None:
    made = make(name)
    assert sorted(describe(made).split(":")) == sorted(name.split(":"))
    assert make(describe(made)) == made != make(name.split(":")[0])


@pytest.mark.parametrize(
    ("make", "name", "match"),
    [
        (saliency, "ria:power=-1", "power is -1.0: give a number from 0 up"),
        (saliency, "ria:power=nan", "power is 'nan': give a number from 0 up"),
        (saliency, "ria:strength=1", '"strength=1" is not an option of ria: give numbers for power=0.5'),
        (saliency, "wanda:power=1", '"power=1" is not an option of wanda: it has none'),
        (saliency, "wnda", r'unknown saliency "wnda": did you mean "wanda"\?'),
        (saliency, "obs:damping=1:damping=2", '"obs" is given damping twice'),
        (update, "sparsegpt:block=6.7", "block is '6.7': give a whole number from 1"),
        (update, "sparsegpt:block=0", "block is 0: give a whole number from 1"),
        (update, "sparsegpt:", '"" is not an option of sparsegpt: give numbers for damping=0.01, block=128'),
        (update, "admm:penalty=0", "penalty is 0.0: give a number above 0 up"),
        (update, "admm:iterations=0", "iterations is 0: give a whole number from 1"),
        (update, "none:damping=1", '"damping=1" is not an option of none: it has none'),
        (permuter, "newton:rounds=6.7", "rounds is '6.7'"),
        (permuter, "newton:rounds=-1", "rounds is -1"),
    ],
)
def test_what_is_not_understood_is_refused(make: Any, name: str, match: str) -> None:
    with pytest.raises(PermpruneError, match=match):
        make(name)


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(PermpruneError, match=r"the saliency is .*: give its name, or the Wanda\(\)"):
        saliency(Wanda)  # type: ignore[arg-type]
    with pytest.raises(PermpruneError, match=r"the update is Wanda\(\): give its name, or the Update object"):
        update(Wanda())  # type: ignore[arg-type]

    @dataclass(frozen=True)
    class Nameless(LocalPermuter):
        def order(self, network: PrunedNetwork, problem: Problem, generator: torch.Generator) -> Tensor:
            return problem.identity()

    with pytest.raises(PermpruneError, match="Nameless has no name: give its class one"):
        permuter(Nameless())


def test_objects_are_described_by_what_differs() -> None:
    assert describe(Mine()) == "mine"
    assert describe(Mine(start=Identity(), depth=3)) == "mine:start=none:depth=3"
    assert describe(Newton(objective=Objective(divergence=2.0))) == "newton:divergence=2.0"
    assert describe(Mine(start=torch.argsort)) == describe(Mine(start=torch.argsort))
    assert " at 0x" not in describe(Mine(start=describe))
