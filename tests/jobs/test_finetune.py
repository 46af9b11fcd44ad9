"""Fine-tuning to a folder: heads for the labels there are, zeros that stay, and the record."""

import copy
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerFast

from permprune import prune
from permprune.checkpoints.io import load, read_model
from permprune.checkpoints.record import Epoch
from permprune.config import PruneConfig
from permprune.engine.measuring import Evaluation
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.jobs.evaluate import evaluate
from permprune.jobs.finetune import FineTuning, finetune
from permprune.jobs.prune import prune_to_folder
from permprune.jobs.student import teacher_of
from permprune.jobs.verify import verify
from permprune.losses.objective import Objective, block_outputs
from permprune.losses.targets import labelled, next_token
from permprune.models.autocast import autocast
from permprune.models.forward import padding_of
from permprune.models.layers import block_linears
from permprune.training.loop import Trainer

from ..faults.pruned import SETTINGS, WINDOWS

pytestmark = pytest.mark.slow


def table(path: Path, scores: bool = False) -> Path:
    """Sentences that are labelled by their first word."""
    generator = random.Random(0)
    words = ["the", "order", "of", "channels", "text", "weights"]
    rows = []
    for number in range(90):
        first = number % 6
        label = f"{first / 2}" if scores else ("entailment" if first > 2 else "not_entailment")
        rows.append(
            f"{' '.join([words[first], *generator.choices(words, k=generator.randrange(6))])} {number}\t{label}"
        )
    path.write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def encoder(tiny_bert: Path, tmp_path: Path) -> str:
    """A folder with an encoder without a head."""
    folder = tmp_path / "encoder"
    AutoModel.from_pretrained(tiny_bert).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_bert / name).read_bytes())
    return str(folder)


def test_an_encoder_is_given_a_head_for_the_classes(encoder: str, tmp_path: Path) -> None:
    data = table(tmp_path / "classes.tsv")
    options = FineTuning(str(data), epochs=6, lr=3e-3, batch=8)
    found = finetune(encoder, tmp_path / "tuned", options)
    assert found.result.metric.name == "top-1 accuracy" and found.result.value > 0.8 and found.result.count == 9
    assert found.examples == 81 and len(found.curve) == 7
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert model.config.id2label == {0: "entailment", 1: "not_entailment"}
    assert not list(tmp_path.glob("tuned.*"))
    with pytest.raises(PermpruneError, match="exists already"):
        finetune(encoder, tmp_path / "tuned", options)
    finetune(encoder, tmp_path / "again", options)
    for one, other in zip(model.parameters(), load_plain(tmp_path / "again"), strict=True):
        assert torch.equal(one, other)


def test_an_interrupted_run_goes_on(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = FineTuning(str(table(tmp_path / "classes.tsv")), epochs=2, lr=3e-3, batch=8)
    whole = finetune(encoder, tmp_path / "whole", options)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("permprune.pruning.folder.write_weights", full)
        with pytest.raises(PermpruneError, match="No space left on device"):
            finetune(encoder, tmp_path / "out", options)
    with pytest.raises(PermpruneError, match="another epochs"):
        finetune(encoder, tmp_path / "out", FineTuning(options.data, epochs=3, lr=3e-3, batch=8), resume=True)
    monkeypatch.setattr("permprune.training.loop.Trainer._epoch", full)  # nothing is trained again
    found = finetune(encoder, tmp_path / "out", options, resume=True)
    assert [point.value for point in found.curve] == [point.value for point in whole.curve]
    for one, other in zip(load_plain(tmp_path / "whole"), load_plain(tmp_path / "out"), strict=True):
        assert torch.equal(one, other)


def load_plain(folder: Path) -> list[torch.nn.Parameter]:
    return list(AutoModelForSequenceClassification.from_pretrained(folder).parameters())


def test_scores_are_learned_and_pruned(encoder: str, tmp_path: Path) -> None:
    data = str(table(tmp_path / "scores.tsv", scores=True))
    dense = tmp_path / "dense"
    found = finetune(encoder, dense, FineTuning(data, epochs=6, lr=3e-3, batch=8, metric="spearman"))
    assert found.result.metric.name == "Spearman correlation" and found.result.value > 0.5 and found.dense is None
    settings, evaluation = Evaluation(data, 1).beside(PruneConfig(calibration=data, samples=8, length=16))
    record = prune_to_folder(
        str(dense), tmp_path / "pruned", settings.replace(order="newton:rounds=2"), evaluation=evaluation
    )
    assert record.measured and record.measured.metric == "Pearson correlation"
    assert verify(tmp_path / "pruned").layers == 12


@pytest.fixture
def objectives(monkeypatch: pytest.MonkeyPatch) -> list[Objective]:
    """What each training that ends from here on minimised."""
    found, fit = [], Trainer.fit

    def spy(trainer: Trainer, examples: Examples) -> list[Epoch]:
        found.append(trainer.loss)
        return fit(trainer, examples)

    monkeypatch.setattr(Trainer, "fit", spy)
    return found


@pytest.mark.parametrize("mode", ["fold", "gather"])
def test_what_was_pruned_stays_zero(encoder: str, tmp_path: Path, mode: str, objectives: list[Objective]) -> None:
    data = str(table(tmp_path / "classes.tsv"))
    dense, pruned, tuned = (tmp_path / name for name in ("dense", "pruned", "tuned"))
    finetune(encoder, dense, FineTuning(data, epochs=6, lr=5e-4, batch=8))
    settings, evaluation = Evaluation(data, 1).beside(PruneConfig(calibration=data, samples=8, length=16, mode=mode))
    prune_to_folder(str(dense), pruned, settings.replace(order="ria"), evaluation=evaluation)
    options = FineTuning(data, dev=data, teacher=str(dense), epochs=4, lr=2e-4, batch=8)
    found = finetune(str(pruned), tuned, options)
    taught = Objective(task=0.0, divergence=1.0, hidden_states=20.0)  # the labels are the dense model's
    assert objectives == [Objective(), taught]
    losses = [epoch.held_out or math.inf for epoch in found.curve]
    assert min(losses) < 0.9 * losses[0]
    assert found.dense == evaluate(str(dense), Evaluation(data, 1, 128)).value
    assert verify(tuned).layers == 12
    record = json.loads((tuned / "permprune.json").read_text())
    assert (
        record["optimised"]["curve"] == found.to_json()["curve"] and record["gathers"] == load_record(pruned)["gathers"]
    )
    before, after = (dict(load(folder).named_parameters()) for folder in (pruned, tuned))
    for layer in record["layers"]:
        name = f"{layer['name']}.weight"
        assert torch.equal(before[name] == 0, after[name] == 0) and not torch.equal(before[name], after[name])
    assert load_record(pruned)["optimised"] is None


def test_the_hidden_states_of_the_teacher_stand_in_the_order_of_the_student(encoder: str, tmp_path: Path) -> None:
    """Of a teacher that is dense, and of one that was pruned once where the student was twice."""
    data = str(table(tmp_path / "classes.tsv"))
    dense, pruned, twice = tmp_path / "dense", tmp_path / "pruned", tmp_path / "twice"
    finetune(encoder, dense, FineTuning(data, epochs=1, lr=3e-3, batch=8))
    for number, (source, out) in enumerate([(dense, pruned), (pruned, twice)]):
        config = PruneConfig(order="random", calibration=data, samples=8, length=16, seed=number, pattern="3:4")
        prune_to_folder(str(source), out, config, evaluation=Evaluation(data, 1, 16))
    for learning, teaching in ((pruned, dense), (twice, dense), (twice, pruned)):
        options = FineTuning(data, teacher=str(teaching), hidden=1.0, train="norms", epochs=1)
        student, processor, _ = read_model(str(learning))
        examples, _ = options.examples(student, processor)
        taught = teacher_of(options, student, examples, labelled)
        assert taught
        teacher = taught.model
        plain, _, _ = read_model(str(teaching))
        with torch.no_grad():
            assert torch.allclose(labelled(teacher, examples).logits, labelled(plain, examples).logits, atol=1e-4)
            shown = []
            for model in (student, teacher, plain):
                with block_outputs(model, padding_of(model, examples)) as outputs:
                    labelled(model, examples)
                shown.append(torch.cat([output.flatten() for output in outputs]))
        near, far = ((shown[0] - other).square().mean() for other in shown[1:])
        assert near < 0.5 * far
    assert finetune(str(twice), tmp_path / "tuned", options).to_json()["hidden"] == 1.0
    verify(tmp_path / "tuned")


def test_a_teacher_in_bf16_is_held_as_it_is_stored(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(tiny_checkpoint).bfloat16().save_pretrained(tiny_checkpoint)
    config = PruneConfig(order="random", calibration=str(tiny_text), samples=24, length=16)
    prune_to_folder(str(tiny_checkpoint), tmp_path / "pruned", config, evaluation=Evaluation(str(tiny_text), 4, 16))
    options = FineTuning(str(tiny_text), teacher=str(tiny_checkpoint), rows=8, length=16)
    (student, processor, _), (plain, _, _) = (read_model(str(one)) for one in (tmp_path / "pruned", tiny_checkpoint))
    examples, _ = options.examples(student, processor)
    taught = teacher_of(options, student, examples, next_token)
    assert taught and {layer.stored.dtype for layer in block_linears(taught.model)} == {torch.bfloat16}
    with torch.no_grad():
        shown = (next_token(model, examples).logits for model in (taught.model, plain))
        torch.testing.assert_close(*shown, rtol=1e-4, atol=1e-5)  # in fp32, in another order of channels
        with autocast(torch.device("cpu"), torch.bfloat16):
            taught_in_bf16, plain_in_bf16 = (next_token(model, examples).logits for model in (taught.model, plain))
    assert (taught_in_bf16 - plain_in_bf16).norm() < 0.01 * plain_in_bf16.norm()
    plain.config.intermediate_size *= 2
    wider = replace(options, teacher=LlamaForCausalLM(plain.config))
    with pytest.raises(PermpruneError, match="has other channels than the model: give the dense model as teacher"):
        teacher_of(wider, student, examples, next_token)


def load_record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "permprune.json").read_text())
    return found


def test_text_is_learned_through_norms_alone_or_adapters_that_are_merged(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, objectives: list[Objective]
) -> None:
    text, pruned, tuned = str(tiny_text), tmp_path / "pruned", tmp_path / "tuned"
    settings = PruneConfig(calibration=text, samples=24, length=16)
    prune_to_folder(str(tiny_checkpoint), pruned, settings.replace(order="ria"), evaluation=Evaluation(text, 4, 16))
    options = FineTuning(text, train="norms", teacher=str(tiny_checkpoint), epochs=2, rows=40, length=16)
    found = finetune(str(pruned), tuned, options)
    assert found.result.metric.name == "perplexity" and found.result.value < found.before
    assert found.dense and found.dense > 1 and "dense and" in Path(tuned, "report.html").read_text(encoding="utf-8")
    assert objectives == [Objective(task=1.0, divergence=1.0)]
    verify(tuned)
    before, after = (dict(load(folder).named_parameters()) for folder in (pruned, tuned))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("norm" in name for name in changed)

    options = FineTuning(text, adapters=4, teacher=str(tiny_checkpoint), epochs=1, rows=40, length=16)
    found = finetune(str(pruned), tmp_path / "adapted", options)
    assert found.result.value < found.before and found.to_json()["adapters"] == 4 and found.training.rate == 1e-3
    verify(tmp_path / "adapted")
    after = dict(load(tmp_path / "adapted").named_parameters())
    assert {name for name in before if torch.equal(before[name], after[name])} == {"model.embed_tokens.weight"}
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before)


def test_what_cannot_be_packed_is_not_trained_and_what_was_trained_is_packed_in_another_type(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    objectives: list[Objective],
) -> None:
    pruned = {pattern: tmp_path / pattern.replace(":", "-") for pattern in ("8:32", "2:4")}
    for pattern, folder in pruned.items():
        model = copy.deepcopy(tiny_llama)
        prune(model, examples=WINDOWS, pattern=pattern, **SETTINGS).save_pretrained(folder, tiny_tokenizer)
    options = FineTuning(str(tiny_text), epochs=1, rows=16, length=16, pack="fp16")
    with pytest.raises(PermpruneError, match="8:32 cannot be packed: M is at most 16"):
        finetune(str(pruned["8:32"]), tmp_path / "out", options)
    assert not objectives

    def overflow(*_: object, **__: object) -> None:
        raise PermpruneError("too large for fp16")

    with monkeypatch.context() as patch, pytest.raises(PermpruneError, match="too large for fp16"):
        patch.setattr("permprune.jobs.packing.pack", overflow)
        finetune(str(pruned["2:4"]), tmp_path / "out", options)
    monkeypatch.setattr("permprune.training.loop.Trainer._epoch", overflow)  # nothing is trained again
    finetune(str(pruned["2:4"]), tmp_path / "out", replace(options, pack="bf16"), resume=True)
    assert verify(tmp_path / "out").layers == 14


def test_what_cannot_be_learned_is_refused(encoder: str, tiny_bert: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.tsv"
    one.write_text("sentence\tlabel\nthe order\tno\na text\tno\n")
    with pytest.raises(PermpruneError, match="has 1 classes"):
        finetune(encoder, tmp_path / "out", FineTuning(str(one)))
    data = str(table(tmp_path / "classes.tsv"))
    with pytest.raises(PermpruneError, match='has the label "not_entailment", which the model does not know'):
        finetune(str(tiny_bert), tmp_path / "out", FineTuning(data))
    with pytest.raises(PermpruneError, match="has 3 outputs but the model 2"):
        finetune(encoder, tmp_path / "out", FineTuning(data, teacher=str(tiny_bert)))
    with pytest.raises(PermpruneError, match="choose one of all, norms, head"):
        finetune(encoder, tmp_path / "out", FineTuning(data, train="some"))
    with pytest.raises(PermpruneError, match="--adapters trains linear layers, --train norms does not"):
        FineTuning(data, train="norms", adapters=4)
    with pytest.raises(PermpruneError, match=r"--hidden weighs the distance to a teacher.*name a --teacher"):
        FineTuning(data, hidden=2.0)
