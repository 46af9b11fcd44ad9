"""Values of int4 that are solved on calibration examples."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.inference.pack import pack
from permprune.kernels.product.module import PackedLinear
from tests.inference.test_pack import prune_to, say


def test_a_model_with_solved_values_is_nearer_to_the_pruned_one(tiny_llama: LlamaForCausalLM) -> None:
    patterns, tokens = prune_to(tiny_llama), torch.randint(0, 90, (32, 24), generator=torch.Generator().manual_seed(0))
    expected = say(tiny_llama, input_ids=tokens)
    rounded, solved = copy.deepcopy(tiny_llama), tiny_llama
    pack(rounded, patterns, dtype="int4")
    assert pack(solved, patterns, dtype="int4", examples=Examples.of(tokens)) == []
    assert {module.layout.dtype for module in solved.modules() if isinstance(module, PackedLinear)} == {torch.int4}
    errors = [(say(model, input_ids=tokens) - expected).square().sum() for model in (solved, rounded)]
    assert errors[0] < 0.9 * errors[1]


def test_values_of_other_types_are_not_solved(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(PermpruneError, match="values in bf16 are rounded, not solved"):
        pack(tiny_llama, prune_to(tiny_llama), examples=Examples.of(torch.zeros(2, 8, dtype=torch.int64)))
