"""Tasks of lm-eval and WikiText-2, from Python and on the command line."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import torch.nn.functional as F
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import permprune
from permprune import PermpruneError, TaskList, evaluate_tasks
from permprune.config import PruneConfig
from permprune.evaluation import lm_tasks
from permprune.evaluation.lm_tasks import average, cut
from permprune.evaluation.result import TASK_ACCURACY, Metric, Result
from permprune.system.progress import console

from ..cli.running import fails, run
from .task_files import ROWS, WIKITEXT, write_task

CHOICES = ("sol1", "sol2")


@pytest.fixture(autouse=True)
def wikitext(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short text in place of WikiText-2, which is on the hub."""
    monkeypatch.setattr(lm_tasks, "load_documents", lambda *_: [WIKITEXT])


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "task"
    yield write_task(folder)
    for name in [name for name in sys.modules if name.startswith(str(folder))]:  # lm-eval keeps them by path
        del sys.modules[name]


@pytest.fixture
def pruned(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Prunes the tiny LLaMA in a mode and gives the folder."""

    def prune(mode: str) -> Path:
        settings = PruneConfig(order="ria", mode=mode, calibration=str(tiny_text), samples=24, length=16)
        evaluation = permprune.Evaluation(str(tiny_text), 4, 16)
        permprune.prune_to_folder(str(tiny_checkpoint), tmp_path / mode, settings, evaluation=evaluation)
        return tmp_path / mode

    return prune


@pytest.mark.slow
def test_a_saved_folder_scores_as_lm_eval_by_hand_says(pruned: Callable[[str], Path], file: Path) -> None:
    folder = pruned("fold")
    found = evaluate_tasks(str(folder), TaskList(files=(str(file),)))
    arguments = {"pretrained": str(folder), "dtype": "float32"}
    manager = TaskManager(include_defaults=False)
    by_hand = lm_eval.simple_evaluate("hf", arguments, [str(file)], device="cpu", task_manager=manager)
    assert [result.metric.name for result in found] == ["acc", "acc_norm"]
    for result in found:
        figures = by_hand["results"]["own"]
        assert result.value == pytest.approx(figures[f"{result.metric.name},none"], abs=1e-12)
        assert result.stderr == pytest.approx(figures[f"{result.metric.name}_stderr,none"], abs=1e-12)
        assert result.count == len(ROWS) and result.metric.higher_is_better


def test_a_gathered_folder_scores_by_its_own_likelihoods(pruned: Callable[[str], Path], file: Path) -> None:
    folder = pruned("gather")
    acc, acc_norm = evaluate_tasks(str(folder), TaskList(files=(str(file),)))
    model, tokenizer = permprune.load(folder), AutoTokenizer.from_pretrained(folder)
    likelihood = partial(_log_likelihood, model, tokenizer)
    rows = [[likelihood(f"Question: {row['goal']}\nAnswer:", f" {row[key]}") for key in CHOICES] for row in ROWS]
    scores, lengths = torch.tensor(rows), torch.tensor([[len(row[key]) for key in CHOICES] for row in ROWS])
    right = torch.tensor([row["label"] for row in ROWS])
    assert acc.value == (scores.argmax(1) == right).double().mean()
    assert acc_norm.value == ((scores / lengths).argmax(1) == right).double().mean()


@torch.inference_mode()
def _log_likelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    whole, first = tokenizer(prompt + answer)["input_ids"], tokenizer(prompt)["input_ids"]
    logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logits[at - 1, whole[at]]) for at in range(len(first), len(whole)))


@pytest.mark.parametrize("begins", [False, True])
def test_wikitext2_is_what_the_recipe_of_wanda_gives(begins: bool, tiny_checkpoint: Path) -> None:
    model, tokenizer, _ = permprune.read_model(str(tiny_checkpoint))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    (result,) = evaluate_tasks(model, TaskList(("wikitext2",)), tokenizer)
    ids = tokenizer(WIKITEXT, return_tensors="pt").input_ids
    assert ids.eq(1).sum() == begins
    length, losses = 128, []
    count = ids.numel() // length
    for at in range(count):
        window = ids[:, at * length : (at + 1) * length]
        with torch.no_grad():
            logits = model(window).logits
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), window[:, 1:].reshape(-1))
        losses.append(loss * length)
    expected = torch.exp(torch.stack(losses).sum() / (count * length)).item()
    assert count > 3
    assert (result.task, result.metric.name, result.unit) == ("wikitext2", "perplexity", "tokens")
    assert result.count == count * (length - 1)
    assert result.value == pytest.approx(expected, rel=1e-5)


def test_a_limit_leaves_the_first_examples(tiny_checkpoint: Path, file: Path) -> None:
    found = evaluate_tasks(str(tiny_checkpoint), TaskList(("wikitext2",), files=(str(file),), limit=1))
    assert {result.task: result.count for result in found} == {"own": 1, "wikitext2": 127}
    assert all(result.stderr is None for result in found)


def test_what_is_shown_while_tasks_run_is_not_redirected(
    tiny_llama: Any,
    tiny_tokenizer: Any,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def evaluate(*_: Any, **__: Any) -> dict[str, Any]:
        print("a bar of lm-eval", file=sys.stderr)
        console.print("still running")
        return {"n-samples": {}}

    monkeypatch.setattr("lm_eval.evaluator.evaluate", evaluate)
    evaluate_tasks(tiny_llama, TaskList(files=(str(file),)), tiny_tokenizer)
    console.print("over")
    assert capsys.readouterr().err == "still running\nover\n"


def test_the_model_and_its_tokenizer_are_left_alone(tiny_llama: Any, tiny_tokenizer: Any, file: Path) -> None:
    tiny_llama.train()
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    evaluate_tasks(tiny_llama, TaskList(("wikitext2",), files=(str(file),)), tiny_tokenizer)
    assert tiny_llama.training
    assert tiny_tokenizer.pad_token is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.state_dict().items())


def test_average_weighs_tasks_alike() -> None:
    own = [
        Result("a", TASK_ACCURACY, 0.5, count=10, stderr=0.3),
        Result("a", Metric("acc_norm", higher_is_better=True), 0.9, count=10, stderr=0.1),
        Result("b", TASK_ACCURACY, 0.75, count=99, stderr=0.4),
    ]
    assert average(own) == Result("average", TASK_ACCURACY, 0.625, count=2, stderr=0.25, unit="tasks")
    assert average(own[1:2]) is None
    more = [*own, Result("c", TASK_ACCURACY, 1.0, count=1)]
    assert average(more) == Result("average", TASK_ACCURACY, 0.75, count=3, unit="tasks")


def test_what_cannot_be_measured(
    tiny_bert: Path, file: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    with pytest.raises(PermpruneError, match="is not a language model"):
        evaluate_tasks(str(tiny_bert), TaskList(files=(str(file),)))
    manager = partial(TaskManager, include_defaults=False)  # the list of all tasks takes half a minute
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: manager())
    with pytest.raises(PermpruneError, match=r"nosuch: lm-eval has no such task; `lm_eval ls tasks`"):
        TaskList(("nosuch",)).load()
    with pytest.raises(PermpruneError, match="names no task"):
        TaskList(()).load()
    with pytest.raises(PermpruneError, match="a window needs 64"):
        cut("the text", tiny_tokenizer, 64)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(PermpruneError, match=r"pip install 'permprune\[tasks\]'"):
        TaskList(("cb",)).load()


def test_a_perplexity_alone_needs_no_lm_eval(
    tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    (result,) = evaluate_tasks(tiny_llama, TaskList(("wikitext2",)), tiny_tokenizer)
    assert math.isfinite(result.value)


def test_evaluate_writes_a_row_for_each_metric(
    tiny_checkpoint: Path,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # outside a repository
    figures, other = tmp_path / "figures.json", write_task(file.parent, "other")
    tasks = ["--tasks", "wikitext2", "--task-file", file, "--task-file", other]
    code, stdout, stderr = run("evaluate", tiny_checkpoint, *tasks, "--json", figures)
    assert code == 0 and not stderr.strip()
    assert not capfd.readouterr().err.strip(), "programs that lm-eval calls are silent as well"
    found = json.loads(figures.read_text())
    assert (found["names"], found["limit"], found["files"]) == (["wikitext2"], None, [str(file), str(other)])
    rows = {(row["task"], row["metric"]): row for row in found["results"]}
    metrics = [(task, metric) for task in ("own", "other") for metric in ("acc", "acc_norm")]
    assert list(rows) == [*metrics, ("wikitext2", "perplexity"), ("average", "acc")]
    assert rows["own", "acc"]["examples"] == len(ROWS) and rows["average", "acc"]["tasks"] == 2
    lines = [line.split() for line in stdout.splitlines() if "│" in line]
    assert [line[1] for line in lines] == [task for task, _ in rows]
    for line, row in zip(lines, rows.values(), strict=True):
        assert ("±" in line) is (row["stderr"] is not None)


@pytest.mark.parametrize("name", ["own.yaml", "./own.yaml", "OWN.YML", "../task/own.yaml", "/tmp/own", "a\\own", "own"])
def test_tasks_are_names_and_run_nothing(
    name: str, file: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    file.with_name("own").write_bytes(file.read_bytes())
    expected = f"give --task-file {name}, which runs"
    if name == "own":  # a name like any other, and a file here
        manager = partial(TaskManager, include_defaults=False)
        monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: manager())
        expected = "lm-eval has no such task"
    assert expected in fails("evaluate", tiny_checkpoint, "--tasks", name)
    assert not (file.parent / "ran").exists()


def test_a_group_may_name_tasks_of_lm_eval(file: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def manager(**options: object) -> object:
        asked.append(options["include_defaults"])
        raise ValueError("enough")

    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)
    group = file.with_name("group.yaml")
    group.write_text("task: [piqa]\ngroup: several\n")
    for one in (file, group):
        assert "enough" in fails("evaluate", tiny_checkpoint, "--task-file", one)
    assert asked == [False, True]


def test_task_files_that_are_none(file: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert "there is no task file" in fails("evaluate", tiny_checkpoint, "--task-file", tmp_path / "none.yaml")
    file.with_name("rows.py").write_text("raise ValueError('broken')\n")
    assert "broken" in fails("evaluate", tiny_checkpoint, "--task-file", file)
    for content in (b"{" * 2000, b"\xff\xfe", b"[1, 2]"):
        file.write_bytes(content)
        fails("evaluate", tiny_checkpoint, "--task-file", file)


def test_the_help_says_that_code_runs() -> None:
    assert "code that it names runs" in " ".join(run("evaluate", "--help")[1].replace("│", " ").split())
