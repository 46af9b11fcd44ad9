"""The rows of the benchmark in the form of the literature."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from permprune.evaluation.perplexity import perplexity

FILE = Path(__file__).parents[2] / "benchmarks" / "protocol.py"


def test_a_result_survives_its_row(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FILE.parent)
    code = runpy.run_path(str(FILE))
    result = perplexity(tiny_llama, torch.arange(60).view(4, 15))
    row = json.loads(json.dumps(code["row_of"](result)))
    assert code["result_of"](row) == result and code["row_of"](code["result_of"](row)) == row
