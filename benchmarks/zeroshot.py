"""What each permuter leaves of a model's scores on tasks: a Markdown table of methods and tasks, with standard errors.

The tasks are those of `permprune evaluate --tasks`, from a folder of files or from the hub. The dense model and no
permutation are measured as well. A method may be given options, as in newton:rounds=24. With --rows every score is
added to a file as soon as it is there, and what the file has is not measured again.

python benchmarks/zeroshot.py --data tasks/ --calibration wiki.valid.tokens --rows zeroshot.jsonl
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quality import data_name

from permprune import PruneConfig, Result, TaskList, read_model
from permprune.evaluation.lm_tasks import average
from permprune.evaluation.result import TASK_ACCURACY, metric_named
from permprune.permuters.registry import permuter
from permprune.pipeline import prepare, update_weights
from permprune.system.progress import log

Row = dict[str, Any]

TASKS = ["arc_easy", "arc_challenge", "boolq", "hellaswag", "piqa", "rte", "cb", "wic", "wikitext2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=["ria", "newton"])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--data", help="folder with local files of the tasks (default: the hub)")
    parser.add_argument("--limit", type=int, help="examples per task (default: all)")
    parser.add_argument("--few-shot", type=int, help="solved examples in each prompt")
    parser.add_argument("--pattern", default=PruneConfig.pattern)
    parser.add_argument("--saliency", default=PruneConfig.saliency)
    parser.add_argument("--update", default=PruneConfig.update)
    parser.add_argument("--mode", default=PruneConfig.mode)
    parser.add_argument("--seed", type=int, default=PruneConfig.seed)
    parser.add_argument("--calibration", help="text to calibrate on (default: the default text)")
    parser.add_argument("--rows", type=Path, help="file of scores, one JSON object a line")
    options = parser.parse_args()
    known = [json.loads(line) for line in options.rows.open()] if options.rows and options.rows.exists() else []
    print(markdown(rows_of(options, known), options.tasks))


def rows_of(options: argparse.Namespace, known: list[Row]) -> list[Row]:
    """A row for each method and task: those known, and the others measured and added to the file."""
    fields = ("model", "pattern", "saliency", "update", "mode", "seed", "limit", "few_shot")
    cell = {name: getattr(options, name) for name in fields} | {"calibration": data_name(options.calibration)}
    rows = [row for row in known if all(row[key] == value for key, value in cell.items())]
    wanted = [(method, task) for method in ("dense", "none", *options.methods) for task in options.tasks]
    have = {(row["method"], row["task"]) for row in rows}
    if missing := [pair for pair in wanted if pair not in have]:
        for found in measure(options, missing):
            rows.append(cell | found)
            log.info("%s", rows[-1])
            if options.rows:
                with options.rows.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    return [row for pair in wanted for row in rows if (row["method"], row["task"]) == pair]


def measure(options: argparse.Namespace, missing: list[tuple[str, str]]) -> Iterator[Row]:
    """Yield the rows of the methods and tasks that are missing, method by method."""
    names = list(dict.fromkeys(task for _, task in missing))
    asked = {"data": options.data, "limit": options.limit, "few_shot": options.few_shot}
    tasks = {name: TaskList((name,), **asked).load() for name in names}
    model, tokenizer, _ = read_model(options.model)
    shared = ("pattern", "saliency", "update", "mode", "seed", "calibration")
    prepared = prepare(model, tokenizer, PruneConfig(**{name: getattr(options, name) for name in shared}))

    def scores(method: str, seconds: float) -> Iterator[Row]:
        for name in (task for own, task in missing if own == method):
            results = [row_of(result) for result in tasks[name](model, tokenizer)]
            yield {"method": method, "task": name, "results": results, "seconds": round(seconds)}

    with prepared.network.dense_weights():
        yield from scores("dense", 0.0)
    for method in dict.fromkeys(own for own, _ in missing if own != "dense"):
        solution = permuter(method).solve(prepared.network, prepared.run)
        update_weights(prepared)
        yield from scores(method, solution.seconds)


def row_of(result: Result) -> Row:
    return {**dataclasses.asdict(result), "metric": result.metric.name}


def result_of(row: Row) -> Result:
    return Result(**{**row, "metric": metric_named(row["metric"])})


def markdown(rows: list[Row], tasks: list[str]) -> str:
    """A line for each method: "acc" in percent, or the first metric of a task that has none, and the mean of "acc"."""
    heads = ["method", *tasks, "mean acc"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [
            (row["task"], [result_of(result) for result in row["results"]]) for row in rows if row["method"] == method
        ]
        cells = {
            task: next((own for own in results if own.metric == TASK_ACCURACY), results[0]) for task, results in found
        }
        mean = average(list(cells.values()))
        shown = [*(cells[task] for task in tasks), *([mean] if mean else [])]
        lines.append("| " + " | ".join([method, *map(figure, shown)]) + " |")
    return "\n".join(lines)


def figure(result: Result) -> str:
    scale, digits = (100, 1) if result.metric == TASK_ACCURACY else (1, 2)
    error = "" if result.stderr is None else f" ± {scale * result.stderr:.{digits}f}"
    return f"{scale * result.value:.{digits}f}{error}"


if __name__ == "__main__":
    main()
