"""A new permuter is one small class: it prunes a model, and its options are read, checked and recorded."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from permprune import LocalPermuter, MaskedLayers, PermpruneError, Problem, prune
from permprune.options import Natural
from permprune.registry import describe

WINDOWS = torch.randint(128, (12, 16), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Rotated(LocalPermuter):
    """Sort channels by their total score, and rotate the result."""

    name: ClassVar[str] = "rotated"
    by: Natural = 1

    def order(self, network: MaskedLayers, problem: Problem, generator: torch.Generator) -> Tensor:
        scores = [network.scores[part.layer][:, part.columns].sum(0) for part in problem.parts]
        return torch.stack(scores).sum(0).argsort(descending=True, stable=True).roll(self.by)


def test_a_new_permuter_prunes(tiny_llama: LlamaForCausalLM) -> None:
    pruned = prune(tiny_llama, order=Rotated(by=3), examples=WINDOWS, precision="fp32")
    assert pruned.record().settings["order"] == describe(Rotated(by=3)) == "rotated:by=3"
    moved = {name: not torch.equal(table, table.sort(-1).values) for name, table in pruned.tables.items()}
    assert moved and all(moved.values())
    with pytest.raises(PermpruneError, match="by is -1: give a whole number from 0 to"):
        Rotated(by=-1)
