import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F

from permprune.data.text import load_documents, tokenize
from permprune.errors import PermpruneError
from permprune.evaluation.perplexity import perplexity

module = sys.modules["permprune.losses.cross_entropy"]


@pytest.fixture
def windows():
    return torch.randint(128, (5, 24), generator=torch.Generator().manual_seed(0))


def _nll(model, windows):
    """Mean negative log-likelihood of each window, (count,)."""
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").double().mean(1)


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
@pytest.mark.parametrize("chunk", [5, 256])
def test_is_exp_of_the_mean_loss(tiny_llama, windows, batch, chunk, monkeypatch):
    monkeypatch.setattr(module, "PROJECTED", chunk)
    nll = _nll(tiny_llama, windows)
    result = perplexity(tiny_llama, windows, batch)
    assert result.value == pytest.approx(nll.mean().exp().item(), rel=1e-5)
    assert result.count == 5 * 23
    assert result.stderr == pytest.approx(result.value * nll.std().item() / math.sqrt(5), rel=1e-3)
    assert result.metric.name == "perplexity"


def test_uniform_model_has_the_vocabulary_as_perplexity(tiny_llama, windows):
    torch.nn.init.zeros_(tiny_llama.lm_head.weight)
    result = perplexity(tiny_llama, windows)
    assert result.value == pytest.approx(128)
    assert result.stderr == pytest.approx(0, abs=1e-3)


def test_low_precision_logits_are_summed_in_fp32(tiny_llama, windows):
    exact = perplexity(tiny_llama, windows).value
    assert perplexity(tiny_llama.bfloat16(), windows).value == pytest.approx(exact, rel=1e-2)


def test_one_window_has_no_error(tiny_llama, windows):
    assert perplexity(tiny_llama, windows[:1]).stderr is None


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_model_as_it_was(tiny_llama, windows, training):
    tiny_llama.train(training)
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    perplexity(tiny_llama, windows)
    assert tiny_llama.training is training
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.state_dict().items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite(tiny_llama, windows, bad):
    windows[windows == 7] = 8
    windows[3, 5] = 7
    with torch.no_grad():
        tiny_llama.get_input_embeddings().weight = torch.nn.Parameter(tiny_llama.get_input_embeddings().weight.clone())
        tiny_llama.get_input_embeddings().weight[7] = bad
    with pytest.raises(PermpruneError, match="window 3 of the text is not finite"):
        perplexity(tiny_llama, windows)


def test_result_is_json(tiny_llama, windows):
    result = perplexity(tiny_llama, windows)
    assert json.loads(json.dumps(result.to_json())) == {
        "task": "language modelling",
        "metric": "perplexity",
        "value": result.value,
        "tokens": 115,
        "stderr": result.stderr,
    }


def test_real_model_reads_real_text(smollm):
    model, tokenizer = smollm
    windows = tokenize(load_documents(None, "evaluation"), tokenizer, 256, 4)
    shuffled = windows.flatten()[torch.randperm(windows.numel(), generator=torch.Generator().manual_seed(0))]
    assert 20 < perplexity(model, windows).value < 80
    assert perplexity(model, shuffled.view_as(windows)).value > 1000
