"""Pruned weights stay zero, whichever optimizer or trainer moves the rest."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, TrainingArguments
from transformers import Trainer as HuggingFaceTrainer

import permprune
from permprune.models.layers import block_linears
from permprune.training.zeros import KeptZeros

from ..faults.pruned import WINDOWS
from ..modalities import make, sentences

OPTIMIZERS = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=1e-2, momentum=0.9, nesterov=True),
    "adafactor": lambda weights: torch.optim.Adafactor(weights, lr=1e-2),
    "lbfgs": lambda weights: torch.optim.LBFGS(weights, lr=1e-2, max_iter=2),
}


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {layer.name: layer.weight == 0 for layer in block_linears(model)}


def pruned(model: PreTrainedModel) -> PreTrainedModel:
    return permprune.prune(model, order="random", examples=WINDOWS).model


@pytest.mark.parametrize("frozen", [False, True])
def test_zeros_stay_zero_and_the_rest_moves(frozen: bool) -> None:
    model, data = make("bert"), sentences()
    layer = model.bert.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    layer.weight.requires_grad_(not frozen)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with KeptZeros(model, ["bert.encoder.layer.0.intermediate.dense"]):
        layer.weight.requires_grad_()
        for _ in range(3):
            optimizer.zero_grad()
            model(**data).loss.backward()
            optimizer.step()
    assert torch.equal(layer.weight == 0, before == 0)
    assert (layer.weight != before)[:, 1::2].all()
    model(**data).loss.backward()
    assert layer.weight.grad[:, ::2].any()  # outside all have gradients again


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_keeps_the_pattern(kind: str, tiny_llama: LlamaForCausalLM) -> None:
    model = pruned(tiny_llama)
    before, weights = zeros(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = OPTIMIZERS[kind](model.parameters())

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = model(input_ids=WINDOWS, labels=WINDOWS).loss
        value.backward()
        return value

    optimizer.step(loss)  # moments of pruned weights, which move them in later steps
    with torch.no_grad():
        for layer in block_linears(model):
            layer.weight.masked_fill_(before[layer.name], 0.0)
    first = loss().item()
    with permprune.keep_pattern(model):
        for _ in range(3):
            optimizer.step(loss)
    after = zeros(model)
    assert all((after[name] >= before[name]).all() for name in before)
    assert loss().item() < first
    assert any(not torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_the_trainer_of_transformers_keeps_the_pattern(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pruned_folder, saved = tmp_path / "pruned", tmp_path / "saved"
    dense, _, _ = permprune.read_model(str(tiny_checkpoint))
    permprune.prune(dense, order="random", examples=WINDOWS).save_pretrained(pruned_folder)
    model = AutoModelForCausalLM.from_pretrained(pruned_folder)
    before = zeros(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "runs"),
        max_steps=5,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_steps=5,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": row, "labels": row} for row in WINDOWS]
    HuggingFaceTrainer(model, arguments, train_dataset=rows, callbacks=[permprune.KeepPattern()]).train()
    after = zeros(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    permprune.save(model, saved)  # read by plain Transformers, written with its record
    assert permprune.verify(saved).layers == len(before)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "checkpoint-5")
    assert all(torch.equal(zeros(written)[name], before[name]) for name in before)


def test_without_it_training_loses_the_pattern_and_saving_says_so(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = pruned(tiny_llama)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model(input_ids=WINDOWS, labels=WINDOWS).loss.backward()
    optimizer.step()
    with pytest.raises(permprune.PermpruneError, match="not 2:4"):
        permprune.save(model, tmp_path / "out")
    with pytest.raises(permprune.PermpruneError, match="not 2:4"):
        permprune.keep_pattern(model)


def test_replaced_parameters_are_noticed(tiny_llama: LlamaForCausalLM) -> None:
    model = pruned(tiny_llama)
    kept = permprune.keep_pattern(model)
    layer = block_linears(model)[0].module
    layer.weight = nn.Parameter(torch.ones_like(layer.weight))
    with pytest.raises(permprune.PermpruneError, match="not zero any more"):
        kept.close()


def test_a_model_without_a_pattern_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(permprune.PermpruneError, match=r"none of the \d+ linear layers"):
        permprune.keep_pattern(tiny_llama)


def test_hooks_end_with_the_context(tiny_llama: LlamaForCausalLM) -> None:
    model = pruned(tiny_llama)
    with pytest.raises(ZeroDivisionError), permprune.keep_pattern(model):
        raise ZeroDivisionError
    callback = permprune.KeepPattern()
    for _ in range(2):  # the first training was interrupted
        callback.on_train_begin(model=model)
    callback.on_train_end()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = zeros(model)
    model(input_ids=WINDOWS, labels=WINDOWS).loss.backward()
    optimizer.step()
    assert not all(torch.equal(zeros(model)[name], before[name]) for name in before)


def test_hooks_that_do_not_end_hold_no_weights() -> None:
    model = make("bert")
    weight = weakref.ref(model.bert.encoder.layer[0].output.dense.weight)
    KeptZeros(model, ["bert.encoder.layer.0.output.dense"])
    del model
    gc.collect()
    assert weight() is None
