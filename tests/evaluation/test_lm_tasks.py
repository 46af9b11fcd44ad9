import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import datasets
import lm_eval
import pytest
import torch
import torch.nn.functional as F
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import permprune
from permprune import PermpruneError, Result, TaskList, evaluate_tasks
from permprune.config import PruneConfig
from permprune.data.benchmarks import SOURCES
from permprune.evaluation.lm_tasks import LOCAL, LoadedTasks, average, cut
from permprune.evaluation.result import TASK_ACCURACY
from permprune.system.progress import console

from ..task_files import ROWS, WIKITEXT, write_task_files

CHOICES = ("sol1", "sol2")
OWN = {"boolq": "super_glue/boolq/default", "cb": "super_glue/cb/default", "wic": "super_glue/wic/default"} | {
    "arc_easy": "arc/arc_easy", "arc_challenge": "arc/arc_challenge", "rte": "glue/rte/default",
    "hellaswag": "hellaswag/hellaswag", "piqa": "piqa/piqa",
}  # fmt: skip
"""Where lm-eval keeps its own tasks."""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_task_files(tmp_path / "files")


@pytest.fixture
def pruned(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Prunes the tiny LLaMA in a mode and gives the folder."""

    def prune(mode: str) -> Path:
        settings = PruneConfig(permute="ria", mode=mode, calibration=str(tiny_text), samples=24, length=16)
        evaluation = permprune.Evaluation(str(tiny_text), 4, 16)
        permprune.prune_to_folder(str(tiny_checkpoint), tmp_path / mode, settings, evaluation=evaluation)
        return tmp_path / mode

    return prune


@pytest.mark.parametrize("task", SOURCES)
def test_prompts_and_metrics_are_those_of_lm_eval(task: str) -> None:
    ours, theirs = (
        load_yaml(LOCAL / f"{task}.yaml"),
        load_yaml(Path(lm_eval.__file__).parent / f"tasks/{OWN[task]}.yaml"),
    )
    source = {"custom_dataset", "dataset_kwargs", "dataset_path", "dataset_name", "tag"}
    parts = {"training_split", "validation_split", "test_split", "process_docs"}
    for config in (ours, theirs):
        for metric in config["metric_list"]:
            metric["aggregation"] = getattr(metric.get("aggregation"), "__name__", metric.get("aggregation"))
        for key in [*config]:
            if key in source | parts or "decontaminat" in key:
                del config[key]
    assert ours == theirs


def test_hellaswag_rows_are_those_that_lm_eval_makes() -> None:
    process = load_yaml(Path(lm_eval.__file__).parent / "tasks/hellaswag/hellaswag.yaml")["process_docs"]
    released = [
        ("Text", "It is short.", "the words"),
        ("Order", "[header] keep the weights.", ""),
        ("Text", "It has (four) words.", "but"),
    ]
    rows = [
        {"activity_label": label, "ctx_a": a, "ctx_b": b, "endings": row["choices"], "label": str(row["label"])}
        for (label, a, b), row in zip(released, ROWS["hellaswag"], strict=True)
    ]
    for made, row in zip(process(datasets.Dataset.from_list(rows)), ROWS["hellaswag"], strict=True):
        assert (made["query"], made["choices"], made["gold"]) == (row["query"], row["choices"], row["label"])


@pytest.mark.slow
def test_a_saved_folder_scores_as_lm_eval_by_hand_says(pruned: Callable[[str], Path], files: Path) -> None:
    folder = pruned("fold")
    found = evaluate_tasks(str(folder), TaskList(tuple(SOURCES), data=str(files)))
    by_hand = _by_hand(folder, list(SOURCES), {"data": str(files)})
    own = [result for result in found if result.task != "average"]
    assert {(result.task, result.metric.name) for result in own} == {
        (task, metric)
        for task in SOURCES
        for metric in (
            "acc",
            *(["f1"] if task == "cb" else ["acc_norm"] if task not in ("boolq", "rte", "wic") else []),
        )
    }
    assert all(result.metric.higher_is_better for result in own)
    for result in own:
        figures = by_hand["results"][result.task]
        assert result.value == pytest.approx(figures[f"{result.metric.name},none"], abs=1e-12)
        stderr = figures[f"{result.metric.name}_stderr,none"]
        assert result.stderr == (None if stderr == "N/A" else pytest.approx(stderr, abs=1e-12))
        assert result.count == len(ROWS[result.task])
    assert len({result.value for result in own}) > 2


def _by_hand(folder: Path, tasks: list[str], metadata: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What `lm_eval --model hf --model_args pretrained=FOLDER --include_path ... --metadata ...` gives."""
    manager = TaskManager(include_path=str(LOCAL), include_defaults=False, metadata=metadata)
    arguments = {"pretrained": str(folder), "dtype": "float32"}
    found: dict[str, Any] = lm_eval.simple_evaluate(
        "hf", arguments, tasks, device="cpu", task_manager=manager, **options
    )
    return found


def test_a_gathered_folder_scores_by_its_own_likelihoods(pruned: Callable[[str], Path], files: Path) -> None:
    folder = pruned("gather")
    tasks = TaskList(("piqa",), data=str(files)).load()
    acc, acc_norm = tasks(*permprune.read_model(str(folder))[:2])
    model, tokenizer = permprune.load(folder), AutoTokenizer.from_pretrained(folder)
    scores = torch.tensor(
        [
            [_log_likelihood(model, tokenizer, f"Question: {row['goal']}\nAnswer:", f" {row[key]}") for key in CHOICES]
            for row in ROWS["piqa"]
        ]
    )
    lengths = torch.tensor([[len(row[key]) for key in CHOICES] for row in ROWS["piqa"]])
    right = torch.tensor([row["label"] for row in ROWS["piqa"]])
    said = torch.tensor([instance.resps[0][0] for instance in tasks.tasks[0].instances]).view_as(scores)
    torch.testing.assert_close(said, scores)
    assert (acc.metric.name, acc.value) == ("acc", (scores.argmax(1) == right).double().mean())
    assert (acc_norm.metric.name, acc_norm.value) == (
        "acc_norm",
        ((scores / lengths).argmax(1) == right).double().mean(),
    )


@torch.inference_mode()
def _log_likelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    whole, first = tokenizer(prompt + answer)["input_ids"], tokenizer(prompt)["input_ids"]
    logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logits[at - 1, whole[at]]) for at in range(len(first), len(whole)))


@pytest.mark.parametrize("begins", [False, True])
def test_wikitext2_is_what_the_recipe_of_wanda_gives(begins: bool, tiny_checkpoint: Path, files: Path) -> None:
    model, tokenizer, _ = permprune.read_model(str(tiny_checkpoint))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    (result,) = TaskList(("wikitext2",), data=str(files)).load()(model, tokenizer)
    rows = [f"{line}\n" if line.strip() else "" for line in WIKITEXT.split("\n")[:-1]]
    ids = tokenizer("\n\n".join(rows), return_tensors="pt").input_ids
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


def test_limit_and_few_shot(tiny_checkpoint: Path, files: Path) -> None:
    found = evaluate_tasks(str(tiny_checkpoint), TaskList(("boolq", "rte", "wikitext2"), data=str(files), limit=1))
    counts = {result.task: result.count for result in found}
    assert counts == {"boolq": 1, "rte": 1, "wikitext2": 127, "average": 2}
    assert all(result.stderr is None for result in found)
    loaded = TaskList(("rte",), data=str(files), few_shot=1).load()
    loaded(*permprune.read_model(str(tiny_checkpoint))[:2])
    prompts = [instance.args[0] for instance in loaded.tasks[0].instances]
    assert all(prompt.count("True or False?") == 2 for prompt in prompts)
    by_hand = _by_hand(tiny_checkpoint, ["rte"], {"data": str(files), "few_shot": 1}, num_fewshot=1)
    assert {sample["arguments"][0][0] for sample in by_hand["samples"]["rte"]} == set(prompts)


def test_few_shot_does_not_apply_to_tasks_without_examples(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zero = tmp_path / "zero.yaml"
    zero.write_text((LOCAL / "rte.yaml").read_text().replace("task: rte", "task: zero\nnum_fewshot: 0"))
    for few_shot in (None, 0, 2):
        assert not caplog.records
        TaskList(("rte",), data=str(files), few_shot=few_shot, files=(str(zero),)).load()
    (record,) = caplog.records
    assert record.message == "zero is defined without solved examples, and --few-shot leaves it so"


def test_what_is_shown_while_tasks_run_is_not_redirected(
    tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate(*_: Any, **__: Any) -> dict[str, Any]:
        print("a bar of lm-eval", file=sys.stderr)
        console.print("still running")
        return {"n-samples": {}}

    monkeypatch.setattr("lm_eval.evaluator.evaluate", evaluate)
    LoadedTasks(TaskList(("any",)), None, [MagicMock()])(tiny_llama, tiny_tokenizer)
    console.print("over")
    assert capsys.readouterr().err == "still running\nover\n"


def test_the_model_and_its_tokenizer_are_left_alone(tiny_llama: Any, tiny_tokenizer: Any, files: Path) -> None:
    tiny_llama.train()
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    TaskList(("cb", "wikitext2"), data=str(files)).load()(tiny_llama, tiny_tokenizer)
    assert tiny_llama.training
    assert tiny_tokenizer.pad_token is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.state_dict().items())


def test_average_weighs_tasks_alike() -> None:
    own = [
        Result("a", TASK_ACCURACY, 0.5, count=10, stderr=0.3),
        Result("a", permprune.Metric("acc_norm", higher_is_better=True), 0.9, count=10, stderr=0.1),
        Result("b", TASK_ACCURACY, 0.75, count=99, stderr=0.4),
    ]
    assert average(own) == Result("average", TASK_ACCURACY, 0.625, count=2, stderr=0.25, unit="tasks")
    assert average(own[1:2]) is None
    more = [*own, Result("c", TASK_ACCURACY, 1.0, count=1)]
    assert average(more) == Result("average", TASK_ACCURACY, 0.75, count=3, unit="tasks")


def test_what_cannot_be_measured(
    tiny_bert: Path, files: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    with pytest.raises(PermpruneError, match="is not a language model"):
        evaluate_tasks(str(tiny_bert), TaskList(("cb",), data=str(files)))
    manager = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: manager(include_path=options["include_path"]))
    with pytest.raises(PermpruneError, match=r"nosuch: lm-eval has no such task; `lm_eval ls tasks`"):
        TaskList(("nosuch", "cb"), data=str(files)).load()
    with pytest.raises(PermpruneError, match=r"cannot read .*wiki\.test\.raw: No such file"):
        TaskList(("wikitext2",), data=str(files / "glue")).load()
    with pytest.raises(PermpruneError, match="there is no folder"):
        TaskList(("cb",), data=str(files / "none")).load()
    with pytest.raises(PermpruneError, match="names no task"):
        TaskList((), data=str(files)).load()
    with pytest.raises(PermpruneError, match="a window needs 64"):
        cut("the text", tiny_tokenizer, 64)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(PermpruneError, match=r"pip install 'permprune\[tasks\]'"):
        TaskList(("cb",), data=str(files)).load()


def test_a_perplexity_alone_needs_no_lm_eval(
    tiny_llama: Any, tiny_tokenizer: Any, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    (result,) = TaskList(("wikitext2",), data=str(files)).load()(tiny_llama, tiny_tokenizer)
    assert math.isfinite(result.value)
