"""The registered costs of methods: inherited, added, or unknown."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import permprune
from permprune.cli.plan import forecast_notes
from permprune.config import PruneConfig
from permprune.forecasts.costs import proposals, stages_of, state_bytes
from permprune.forecasts.forecast import Forecast
from permprune.forecasts.resources import Memory, Phase, Stage, Work, Workload
from permprune.permuters.base import LocalPermuter, Permuter
from permprune.permuters.quadratic import QuadraticModel
from permprune.permuters.registry import PERMUTERS
from permprune.permuters.trust_region import Newton, TrustRegion
from permprune.pruning.masked import MaskedLayers
from permprune.pruning.problem import Problem


@dataclass(frozen=True)
class Backwards(LocalPermuter):
    """The channels in reverse."""

    name: ClassVar[str] = "backwards"

    def order(self, network: MaskedLayers, problem: Problem, generator: torch.Generator) -> Tensor:
        return problem.identity().flip(0)


@dataclass(frozen=True)
class Careful(Newton):
    name: ClassVar[str] = "careful"


@dataclass(frozen=True)
class Idle(TrustRegion):
    name: ClassVar[str] = "idle"

    def propose(self, model: QuadraticModel, memory: Tensor | None, generator: torch.Generator) -> Tensor | None:
        return None


def forecast(source: Path, method: str | Permuter) -> Forecast:
    return permprune.forecast(str(source), PruneConfig(order=method, length=16, samples=24), gpu="h100")


def test_a_method_without_a_registered_cost_runs_and_its_time_is_unknown(
    tiny_llama: LlamaForCausalLM, tiny_checkpoint: Path
) -> None:
    found = forecast(tiny_checkpoint, Backwards())
    assert found.seconds["backwards"] is None
    assert None not in {seconds for name, seconds in found.seconds.items() if name != "backwards"}
    assert "and the stages whose time is not known" in forecast_notes(found.to_json())[2]
    assert found.disk == forecast(tiny_checkpoint, "ria").disk
    windows = torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(1))
    assert permprune.prune(tiny_llama, order=Backwards(), examples=windows).solution.orders


def test_a_subclass_costs_what_its_base_costs(tiny_checkpoint: Path) -> None:
    own, base = (
        forecast(tiny_checkpoint, Careful(rounds=3, swaps=2)),
        forecast(tiny_checkpoint, "newton:rounds=3:swaps=2"),
    )
    renamed = [(stage.name.replace("careful", "newton"), stage.parts, stage.work) for stage in own.stages]
    assert renamed == [(stage.name, stage.parts, stage.work) for stage in base.stages]
    assert own.disk == base.disk


def test_only_the_proposals_of_a_trust_region_are_unknown_without_a_cost(tiny_checkpoint: Path) -> None:
    found = forecast(tiny_checkpoint, Idle()).seconds
    assert [name for name, seconds in found.items() if seconds is None] == ["idle: proposals"]


@pytest.mark.parametrize("name", PERMUTERS)
def test_every_method_has_a_registered_cost(name: str) -> None:
    method = PERMUTERS[name]
    assert stages_of.dispatch(method) is not stages_of.dispatch(Permuter)
    if issubclass(method, TrustRegion):
        assert proposals.dispatch(method) is not proposals.dispatch(TrustRegion)
        assert state_bytes.dispatch(method) is not state_bytes.dispatch(Permuter)


def test_a_cost_can_be_registered(tiny_checkpoint: Path) -> None:
    @dataclass(frozen=True)
    class Counted(Backwards):
        name: ClassVar[str] = "counted"

    @stages_of.register(Counted)
    def _(method: Counted, run: Workload) -> list[Stage]:
        return [Stage(Phase.SEARCH, (Memory("scores", 1234),), Work(moved=run.outline.weights), "counted")]

    found = forecast(tiny_checkpoint, Counted())
    (stage,) = [one for one in found.stages if one.name == "counted"]
    assert Memory("scores", 1234) in stage.parts
    assert (found.seconds["counted"] or 0) > 0
