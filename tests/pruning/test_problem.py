"""Which orders a mode may choose."""

import pytest
import torch
from transformers import LlamaForCausalLM

from permprune.coupling.discovery import discover
from permprune.models.layers import prunable_layers
from permprune.pattern import Pattern
from permprune.pruning.problem import Problem, build_problems


def problems(model: LlamaForCausalLM, mode: str, pattern: str = "2:4") -> dict[str, Problem]:
    coupling = discover(model, {"input_ids": torch.arange(1, 33).view(2, 16)})
    parsed = Pattern.parse(pattern)
    return {p.name: p for p in build_problems(coupling, prunable_layers(model, parsed), parsed, mode)}


def test_fold_mode_orders_the_residual_stream_once(tiny_llama: LlamaForCausalLM) -> None:
    found = problems(tiny_llama, "fold")
    (residual,) = [problem for name, problem in found.items() if name.endswith("residual")]
    assert len(residual.parts) == 2 * 5  # q, k, v, gate and up of each layer
    assert all(problem.space for problem in found.values())


def test_gather_mode_orders_each_reader_of_the_residual_stream(tiny_llama: LlamaForCausalLM) -> None:
    gathered = [problem for problem in problems(tiny_llama, "gather").values() if problem.site]
    assert sorted(len(problem.parts) for problem in gathered) == [2, 2, 3, 3]


@pytest.mark.parametrize("mode", ["fold", "gather"])
def test_every_part_is_made_of_whole_groups_and_no_column_is_ordered_twice(
    tiny_llama: LlamaForCausalLM, mode: str
) -> None:
    columns: dict[str, list[int]] = {}
    for problem in problems(tiny_llama, mode).values():
        for part in problem.parts:
            assert len(part.columns) == problem.size
            assert (part.columns.view(-1, 4)[:, 0] % 4 == 0).all()
            columns.setdefault(part.layer, []).extend(part.columns.tolist())
    assert len(columns) == 14  # every linear of both layers
    assert all(len(set(own)) == len(own) for own in columns.values())


def test_heads_as_wide_as_a_group_are_left_alone(tiny_llama: LlamaForCausalLM) -> None:
    assert not any("o_proj" in name for name in problems(tiny_llama, "fold", "4:8"))
