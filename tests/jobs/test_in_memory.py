"""What the commands do as functions: of a model in memory as of its folder."""

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import permprune
from permprune import Evaluation, FineTuning, Newton, PermpruneError, PruneConfig
from permprune.models.layers import block_linears
from permprune.permuters.base import Identity
from permprune.report.comparison import comparison_table
from permprune.system.files import write_json

from ..faults.pruned import SETTINGS, WINDOWS

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tiny_text: Path) -> PruneConfig:
    return PruneConfig(order="random", calibration=str(tiny_text), samples=24, length=16, precision="fp32")


@pytest.fixture
def evaluation(tiny_text: Path) -> Evaluation:
    return Evaluation(str(tiny_text), 4, 16)


@pytest.fixture
def unchanged(tiny_llama: LlamaForCausalLM) -> Iterator[None]:
    """At the end of the test the model has the weights that it had."""
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    yield
    after = tiny_llama.state_dict()
    assert before.keys() == after.keys()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )


@pytest.mark.usefixtures("unchanged")
def test_compare(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_checkpoint: Path,
    config: PruneConfig,
    evaluation: Evaluation,
) -> None:
    methods = ["ria", Newton(rounds=1)]
    held = permprune.compare(tiny_llama, methods, config, evaluation=evaluation, processor=tiny_tokenizer)
    named = permprune.compare(tiny_checkpoint, methods, config, evaluation=evaluation)
    assert [row.method for row in held.rows] == ["none", "ria", "newton:rounds=1"]
    assert [row.result for row in held.rows] == [row.result for row in named.rows]
    assert held.metric.name == "perplexity" and not held.metric.higher_is_better
    assert held.dense.result == named.dense.result and held.rows[0].gap_closed == 0
    figures = held.to_json()
    assert figures["metric"] == "perplexity" and figures["rows"][0]["perplexity"] == held.rows[0].result.value
    labelled = permprune.compare(
        tiny_llama, {"mine": Identity()}, config, evaluation=evaluation, processor=tiny_tokenizer
    )
    assert [row.method for row in labelled.rows] == ["none", "mine"]


@dataclasses.dataclass(frozen=True)
class Overflowing(permprune.LocalPermuter):
    """Keeps the natural order, and spoils the model."""

    name: ClassVar[str] = "overflowing"

    def order(self, network: Any, problem: Any, generator: torch.Generator) -> torch.Tensor:
        network.model.model.norm.weight.data.fill_(torch.inf)
        return problem.identity()


def test_compare_has_a_row_for_a_model_that_overflows(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, config: PruneConfig, evaluation: Evaluation,
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    found = permprune.compare(
        tiny_llama, ["ria", Overflowing()], config, evaluation=evaluation, processor=tiny_tokenizer
    )
    assert [math.isfinite(row.result.value) for row in found.rows] == [True, True, False]
    assert found.rows[-1].gap_closed is None and found.best.method != "overflowing"
    assert "overflowing: the loss on window 0 of the text is not finite" in caplog.text
    figures = found.to_json()
    printed = StringIO()
    Console(file=printed, width=120).print(comparison_table(figures))
    assert "not finite" in printed.getvalue()
    write_json(tmp_path / "figures.json", figures)
    assert json.loads((tmp_path / "figures.json").read_text())["rows"][-1]["perplexity"] is None


@pytest.mark.usefixtures("unchanged")
def test_a_comparison_that_fails_leaves_the_dense_weights(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, config: PruneConfig, tmp_path: Path
) -> None:
    with pytest.raises(PermpruneError, match="no-text"):
        missing = Evaluation(str(tmp_path / "no-text"), 4, 16)
        permprune.compare(tiny_llama, ["ria"], config, evaluation=missing, processor=tiny_tokenizer)


@pytest.mark.usefixtures("unchanged")
def test_evaluate_and_inspect(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_checkpoint: Path,
    evaluation: Evaluation,
) -> None:
    held = permprune.evaluate(tiny_llama, evaluation, tiny_tokenizer)
    assert held == permprune.evaluate(str(tiny_checkpoint), evaluation)
    with pytest.raises(PermpruneError, match="text needs a tokenizer"):
        permprune.evaluate(tiny_llama, evaluation)
    spaces = permprune.inspect(tiny_llama, verify=True)
    assert [space.name for space in spaces] == [space.name for space in permprune.inspect(tiny_checkpoint)]
    assert all((space.difference is None) == (space.freedom == "frozen") for space in spaces)
    assert max(space.difference or 0.0 for space in spaces) < 1e-6
    residual = next(space for space in spaces if space.name == "model.residual")
    assert (residual.size, residual.blocks, residual.freedom, residual.readers) == (32, 1, "free", 11)
    example = {"input_ids": WINDOWS[:2]}
    assert permprune.inspect(tiny_llama, example=example) == permprune.inspect(tiny_llama)


def test_verify(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(PermpruneError, match="permprune did not prune this model: give one returned by prune or load"):
        permprune.verify(tiny_llama)
    pruned = permprune.prune(tiny_llama, examples=WINDOWS, **SETTINGS)
    pruned.save_pretrained(tmp_path / "out")
    held, written = permprune.verify(pruned.model), permprune.verify(str(tmp_path / "out"))
    assert held.layers == written.layers == 14 and held.dense == written.dense
    assert held.difference < 1e-4 and permprune.verify(permprune.load(tmp_path / "out")) == written
    weight = tiny_llama.model.layers[0].mlp.down_proj.weight
    weight.data[:, [0, 5]] = weight.data[:, [5, 0]]
    with pytest.raises(PermpruneError, match="is not 2:4 in stored order"):
        permprune.verify(tiny_llama)


def test_prune_and_finetune(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_text: Path,
    tmp_path: Path,
    config: PruneConfig,
    evaluation: Evaluation,
) -> None:
    dense: Any = copy.deepcopy(tiny_llama)
    held: dict[str, Any] = {"evaluation": evaluation, "processor": tiny_tokenizer}
    record = permprune.prune_to_folder(tiny_llama, tmp_path / "pruned", config, **held)
    assert record.measured  # sums of products may differ with the place of the weights in memory
    again = permprune.evaluate(tmp_path / "pruned", evaluation).value
    assert record.measured.pruned == pytest.approx(again, rel=1e-6)
    assert permprune.verify(tmp_path / "pruned").layers == permprune.verify(tiny_llama).layers == 14
    weights = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    options = FineTuning(str(tiny_text), teacher=dense, hidden=1e-5, train="norms", epochs=1, rows=40, length=16)
    found = permprune.finetune(tiny_llama, tmp_path / "tuned", options, processor=tiny_tokenizer)
    assert found.model is tiny_llama and found.dense and found.to_json()["teacher"] == "LlamaForCausalLM"
    assert all(torch.equal(tensor, weights[name]) for name, tensor in dense.state_dict().items())
    loaded = permprune.load(tmp_path / "tuned").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in tiny_llama.state_dict().items())
    assert permprune.verify(tmp_path / "tuned").layers == 14
    with pytest.raises(PermpruneError, match="the teacher is the model to be trained"):
        permprune.finetune(dense, tmp_path / "other", options, processor=tiny_tokenizer)


def test_a_head_is_packed_as_int8_at_once(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    config: PruneConfig,
    evaluation: Evaluation,
) -> None:
    shape = copy.deepcopy(tiny_llama.config)
    shape.hidden_size = 64
    held: dict[str, Any] = {"evaluation": evaluation, "processor": tiny_tokenizer}
    model = LlamaForCausalLM(shape).eval()
    permprune.prune_to_folder(model, tmp_path / "packed", config, **held, pack="int8", head="int8")
    assert permprune.load(tmp_path / "packed").get_input_embeddings().values.dtype == torch.int8
    with pytest.raises(PermpruneError, match="give pack too"):
        permprune.prune_to_folder(model, tmp_path / "other", config, **held, head="int8")


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(PermpruneError, match="a Linear is not a model: give a name, a folder or a PreTrainedModel"):
        permprune.evaluate(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


@torch.no_grad()
def test_a_language_model_with_a_teacher_learns_as_fast_as_its_weights_are_large(tiny_llama: LlamaForCausalLM) -> None:
    def rate(teacher: str | None) -> float:
        return FineTuning(None, teacher=teacher).training(tiny_llama, 9).rate

    taught = rate("dense")
    assert rate(None) == 1e-4  # fewer than 50 million parameters
    for layer in block_linears(tiny_llama):
        layer.weight.mul_(0.1)
        layer.weight[:, ::2] = 0  # as many as the pattern prunes; the others keep their size
    assert rate("dense") == pytest.approx(0.1 * taught, rel=0.05)
    assert FineTuning(None, teacher="dense", lr=1e-5).training(tiny_llama, 9).rate == 1e-5
    assert FineTuning(None, teacher="dense", train="norms").training(tiny_llama, 9).rate == 1e-3
