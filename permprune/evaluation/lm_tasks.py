"""Tasks for causal language models, through lm-eval, and WikiText-2 perplexity as pruning papers measure it."""

from __future__ import annotations

import dataclasses
import io
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from pathlib import Path
from typing import Any

from permprune.checkpoints.source import ModelSource, open_model
from permprune.data.sources import read_text
from permprune.data.text import load_documents
from permprune.errors import PermpruneError, first_line
from permprune.evaluation.result import TASK_ACCURACY, Metric, Result
from permprune.models.modality import EVALUATION_BATCH
from permprune.options import Count, require_fields
from permprune.system.failures import failures_reported
from permprune.system.imports import on_first_use
from permprune.system.progress import console

with on_first_use(globals()):
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from permprune.evaluation.perplexity import perplexity
    from permprune.models.forward import evaluating, is_causal_lm
    from permprune.models.modality import positions_of
    from permprune.models.processors import Processor, tokenizer_of
    from permprune.system import distributed

WIKITEXT = "wikitext2"
"""The task that permprune implements itself."""

WIKITEXT_ID = "Salesforce/wikitext:wikitext-2-raw-v1@test"

WINDOW = 2048
"""Number of tokens in a window of WikiText-2, or fewer if the model can read fewer."""

_FILE = re.compile(r"[/\\]|\.ya?ml$", re.IGNORECASE)
"""Matches file names; the names of tasks have no path separator and do not end in .yaml."""

_GROUP = re.compile(r"^group\s*:", re.MULTILINE)
"""Matches the file of a group, which may contain lm-eval's own tasks by name."""


@dataclasses.dataclass(frozen=True)
class TaskList:
    """Tasks of lm-eval, and those that its files define. Raises `PermpruneError` for numbers out of range."""

    names: tuple[str, ...] = ()
    """Tasks of lm-eval, or wikitext2, separated by commas (docs/tasks.md); by default none.

    In Python they are a tuple."""

    _: dataclasses.KW_ONLY

    limit: Count | None = None
    """Examples of each task, by default all.

    Windows of "wikitext2"."""

    files: tuple[str, ...] = ()
    """YAML file of a task or a group of tasks, in the form of lm-eval; the code that it names runs.

    It is named by `!function` or `class`."""

    def __post_init__(self) -> None:
        require_fields(self)

    def load(self) -> list[Any]:
        """Load the tasks of lm-eval. Raises `PermpruneError` if lm-eval, a task or its data is missing."""
        if not self.names and not self.files:
            raise PermpruneError("--tasks names no task: give at least one")
        if file := next(filter(_FILE.search, self.names), None):
            raise PermpruneError(
                f"--tasks takes names, and {file} is a file: give --task-file {file}, which runs the code that it names"
            )
        if missing := next((file for file in self.files if not Path(file).is_file()), None):
            raise PermpruneError(f"there is no task file {missing}: give lm-eval's YAML of a task or a group")
        if distributed.world() > 1:
            raise PermpruneError("tasks can only be measured by one process: evaluate without torchrun")
        names = [name for name in dict.fromkeys(self.names) if name != WIKITEXT]
        if not names and not self.files:
            return []
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise PermpruneError(f"tasks need lm-eval ({error}): pip install 'permprune[tasks]'") from error
        named = bool(names) or any(_GROUP.search(read_text(Path(file))) for file in self.files)
        try:
            with _quiet():
                manager = TaskManager(include_defaults=named)  # takes half a minute
                if unknown := [name for name in names if name not in manager.all_tasks]:  # else taken as paths
                    raise PermpruneError(
                        f"{', '.join(unknown)}: lm-eval has no such task; `lm_eval ls tasks` lists them"
                    )
                return list(manager.load([*names, *self.files])["tasks"].values())
        except PermpruneError:
            raise
        except Exception as error:  # lm-eval and datasets raise whatever their readers and the network raise
            raise PermpruneError(f"{', '.join([*names, *self.files])}: {first_line(error)}") from error


@failures_reported()
def evaluate_tasks(
    model: ModelSource, tasks: TaskList, processor: Processor | None = None, *, trust_remote_code: bool = False
) -> list[Result]:
    """Evaluate a model on tasks; returns a result for each task and metric.

    `model` is a name, a folder, or a model in memory with its `processor`, whose weights and training mode are left as
    they were; `trust_remote_code` is that of `read_model`. With several tasks, the last result is their mean accuracy.
    Raises `PermpruneError` if the model is not a causal language model, or if it or a task cannot be loaded or run.
    """
    loaded = tasks.load()
    text = load_documents(WIKITEXT_ID, "evaluation")[0] if WIKITEXT in tasks.names else None
    opened = open_model(model, processor, trust_remote_code=trust_remote_code)
    if not is_causal_lm(opened.model):
        raise PermpruneError(
            f"a {type(opened.model).__name__} is not a language model, which tasks need: use --data without --tasks"
        )
    tokenizer = tokenizer_of(opened.processor)
    results = _measured(loaded, opened.model, tokenizer, tasks.limit) if loaded else []
    if text is not None:
        length = min(WINDOW, positions_of(opened.model) or WINDOW)
        windows = cut(text, tokenizer, length)[: tasks.limit]
        results.append(dataclasses.replace(perplexity(opened.model, windows, batch=1), task=WIKITEXT))
    mean = average(results)
    return results if mean is None or mean.count == 1 else [*results, mean]


def _measured(
    tasks: list[Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> list[Result]:
    """Evaluate a model on tasks of lm-eval, as its command line does."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in tasks:
        task.set_config(key="num_fewshot", value=task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    named = {"tasks": {task.task_name: task for task in tasks}, "groups": {}}
    with _quiet(), evaluating(model):
        wrapped = HFLM(model, backend="causal", tokenizer=deepcopy(tokenizer), batch_size=EVALUATION_BATCH)
        figures: Any = evaluate(wrapped, named, limit=limit, log_samples=False)
    return [result for name in figures["n-samples"] for result in _results(name, figures)]


def average(results: Sequence[Result]) -> Result | None:
    """Return the unweighted mean accuracy ("acc") of tasks and its standard error; None if no task has an accuracy."""
    scored = [result for result in results if result.metric == TASK_ACCURACY]
    if not scored:
        return None
    errors = [result.stderr for result in scored if result.stderr is not None]
    error = math.hypot(*errors) / len(scored) if len(errors) == len(scored) else None
    mean = math.fsum(result.value for result in scored) / len(scored)
    return Result("average", TASK_ACCURACY, mean, count=len(scored), stderr=error, unit="tasks")


def cut(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """Split a text into windows that do not overlap, int64 (count, length), as GPTQ, SparseGPT and Wanda do.

    The text is tokenised as a whole, so that special tokens, if the tokenizer adds any, occur only once, at the
    beginning. Tokens after the last full window are dropped. Raises `PermpruneError` for a text shorter than a window.
    """
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    count = len(ids) // length
    if not count:
        raise PermpruneError(f"the text has {len(ids)} tokens, but a window needs {length}: give more text")
    return ids[: count * length].view(count, length)


def _results(task: str, returned: Mapping[str, Any]) -> Iterator[Result]:
    """Yield the metrics of a task in what lm-eval returned.

    The keys of its figures are "metric,filter" and "metric_stderr,filter".
    """
    figures, directions = returned["results"][task], returned["higher_is_better"].get(task, {})
    count = returned["n-samples"][task]["effective"]
    for key, value in figures.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = figures.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} ({kind})"
            named = Metric(name, higher_is_better=directions.get(metric) is not False)
            stderr = error if isinstance(error, float) else None
            yield Result(task, named, float(value), count=count, stderr=stderr)


@contextmanager
def _quiet() -> Iterator[None]:
    """A context in which lm-eval logs only errors, and a status line replaces its progress bars.

    lm-eval would draw them even if stderr is not a terminal.
    """
    harness = logging.getLogger("lm_eval")
    before = harness.level
    harness.setLevel(logging.ERROR)
    console.file = sys.stderr  # the status line is shown where it was before the redirection
    try:
        with console.status("measuring tasks"), redirect_stderr(io.StringIO()):
            yield
    finally:
        console.file = None  # type: ignore[assignment]  # again the current stderr
        harness.setLevel(before)
