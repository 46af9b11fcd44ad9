"""Values of int4 that are solved on calibration examples."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

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


def test_a_decoder_without_inputs_reads_what_the_model_generates() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    examples = Examples({"input_ids": torch.randint(64, (4, 8))})
    pack(model, prune_to(model, "2:4"), dtype="int4", examples=examples)
    assert isinstance(model.decoder.block[0].layer[1].EncDecAttention.q, PackedLinear)
