"""What pruning and post-training optimisation leave of GLUE and SuperGLUE scores: a Markdown table.

Each task's dense model is fine-tuned once on nine tenths of the training rows, of which the rest chooses the epoch, and
kept in --work; so is every model pruned from it. "newton+finetune" prunes with newton and then trains what is left with
the dense model as teacher. The seeds draw the rows that calibrate a search and those that train after it. All models
are measured on the task's development rows, which nothing else sees; a task that has no others gives a fifth of its
rows to them. A task's score is the mean of its metrics, as in GLUE and SuperGLUE. RTE, whose rows are the same in both,
is measured once.

With --rows each figure is added to a file as soon as it is there, and what the file has is not measured again. The
errors are those of the mean over the seeds; of one seed, and of the dense model, those of the examples.

python benchmarks/glue.py --data DATA --work WORK --rows glue.jsonl --tasks cb rte
"""

import argparse
import dataclasses
import json
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from permprune import Evaluation, PruneConfig, prune_to_folder
from permprune.data.labelled import read_labelled_text
from permprune.data.sources import read_table
from permprune.jobs.evaluate import evaluate
from permprune.jobs.finetune import FineTuning, finetune
from permprune.system.files import write_whole

Row = dict[str, Any]

FINETUNE = "+finetune"
LENGTH, BATCH = 128, 16
"""Tokens of an example at most, and examples of a step of training."""

WORD_IN_TEXT = re.compile(r"Word: (?P<word>.+?)\. Sentence 1: (?P<sentence1>.+?) Sentence 2: (?P<sentence2>.+)", re.S)
"""A row of WiC written as one text."""

HIDDEN = 1e-3
"""The weight of the blocks' outputs in the training after pruning."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Its files within --data, its metrics, and the epochs of its dense model, by default those of `FineTuning`.

    Without training files a part of the others trains. Rows of fewer than `words` words neither calibrate nor train
    after pruning: SST-2 trains on phrases, and asks for sentences. `samples` are the calibration windows, 32 rows each,
    and `after` the rows that train after pruning, if --samples and --after do not say; fewer of long texts.
    """

    train: tuple[str, ...]
    dev: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    epochs: int | None = None
    words: int = 0
    samples: int = 64
    after: int = 2000


TASKS = {
    "cola": Task(
        ("glue/CoLA/in_domain_train.tsv",),
        ("glue/CoLA/in_domain_dev.tsv", "glue/CoLA/out_of_domain_dev.tsv"),
        ("matthews",),
        epochs=5,
        samples=32,
    ),
    "sst2": Task(("glue/SST-2/train.tsv",), ("glue/SST-2/dev.tsv",), words=12),
    "rte": Task(("glue/RTE/train.tsv",), ("glue/RTE/dev.tsv",), epochs=4, samples=8, after=1000),
    "stsb": Task(("glue/STS-B/train.tsv",), ("glue/STS-B/dev.tsv",), ("pearson", "spearman")),
    "mnli": Task((), ("glue/MNLI/dev_matched.jsonl",)),
    "boolq": Task((), ("superglue/BoolQ/val.jsonl",), samples=8, after=1000),
    "cb": Task(("superglue/CB/train.jsonl",), ("superglue/CB/val.jsonl",), ("accuracy", "f1")),
    "wic": Task(
        ("superglue/WiC/train_part1.reformatted.jsonl", "superglue/WiC/train_part2.reformatted.jsonl"),
        ("superglue/WiC/val.jsonl",),
        samples=32,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the folders glue and superglue")
    parser.add_argument("--work", type=Path, required=True, help="folder for splits and models")
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--methods", nargs="+", default=["dense", "none", "ria", "newton", f"newton{FINETUNE}"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--most", type=int, default=10_000, help="training rows of a task")
    parser.add_argument("--samples", type=int, help="calibration windows of 32 rows (default: depends on the task)")
    parser.add_argument("--after", type=int, help="rows to train on after pruning (default: depends on the task)")
    parser.add_argument("--epochs", type=int, help="epochs of the training after pruning (default: that of finetune)")
    options = parser.parse_args()
    known = [json.loads(line) for line in options.rows.open()] if options.rows and options.rows.exists() else []
    table = []
    for name in options.tasks:
        for seed in options.seeds:
            table += rows_of(options, name, seed, known)
    print(markdown(table, options.methods))


def rows_of(options: argparse.Namespace, name: str, seed: int, known: list[Row]) -> list[Row]:
    """The row of each method: as is known, or measured, and added to what is known and to the file."""
    found = []
    for method in options.methods:
        cell: Row = {"model": options.model, "task": name, "method": method, "most": options.most}
        if method != "dense":
            cell |= {"pattern": options.pattern, "samples": windows(options, name), "seed": seed}
        if method.endswith(FINETUNE):
            cell |= {"after": trained_after(options, name), "epochs": options.epochs}
        row = next((row for row in known if all(row.get(key) == value for key, value in cell.items())), None)
        if row is None:
            began = time.process_time()
            folder = model_folder(options, name, seed, method)
            cost = round(time.process_time() - began)
            row = cell | {"core_seconds": cost, "values": measure(folder, name, splits(options, name).dev)}
            known.append(row)
            if options.rows:
                with options.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        found.append(row)
    return found


def model_folder(options: argparse.Namespace, name: str, seed: int, method: str) -> Path:
    """The folder of a model, which is made if there is none."""
    files = splits(options, name)
    out: Path = options.work / f"{Path(options.model).name}-{name}-{options.most}-{suffix(options, name, seed, method)}"
    if out.exists():
        return out
    tuning = FineTuning(str(files.train), length=LENGTH, batch=BATCH, metric=TASKS[name].metrics[0])
    if method == "dense":
        finetune(options.model, out, dataclasses.replace(tuning, epochs=TASKS[name].epochs))
        return out
    dense = str(model_folder(options, name, seed, "dense"))
    if method.endswith(FINETUNE):
        pruned = model_folder(options, name, seed, method.removesuffix(FINETUNE))
        rows = trained_after(options, name)
        tuning = dataclasses.replace(tuning, data=str(files.like), rows=rows, epochs=options.epochs)
        finetune(str(pruned), out, dataclasses.replace(tuning, teacher=dense, hidden=HIDDEN, seed=seed))
        return out
    config = PruneConfig(
        pattern=options.pattern,
        order=method,
        calibration=str(files.like),
        samples=windows(options, name),
        length=LENGTH,
        seed=seed,
    )
    prune_to_folder(dense, out, config, evaluation=Evaluation(str(files.dev), 1, LENGTH))
    return out


def suffix(options: argparse.Namespace, name: str, seed: int, method: str) -> str:
    """What tells the folder of a method's model from those of others of the task."""
    if method == "dense":
        return method
    trained = f"-{trained_after(options, name)}-{options.epochs}" if method.endswith(FINETUNE) else ""
    return f"{options.pattern}-{windows(options, name)}-{seed}-{method}{trained}".replace(":", "-")


def windows(options: argparse.Namespace, name: str) -> int:
    """Calibration windows of a task."""
    return int(options.samples or TASKS[name].samples)


def trained_after(options: argparse.Namespace, name: str) -> int:
    """Rows of a task that train after pruning."""
    return int(options.after or TASKS[name].after)


class Files(NamedTuple):
    """Of a task: rows to train on, those of them that are like the ones asked for, and rows to measure on."""

    train: Path
    like: Path
    dev: Path


def splits(options: argparse.Namespace, name: str) -> Files:
    """The files of a task; at most --most rows train, drawn at random."""
    folder = options.work / f"{name}-{options.most}"
    files = Files(*(folder / f"{part}.jsonl" for part in Files._fields))
    if not files.dev.exists():
        rows = [list(read(options.data, sources)) for sources in (TASKS[name].train, TASKS[name].dev)]
        mixed = rows[0] or rows[1]
        mixed = [mixed[at] for at in torch.randperm(len(mixed), generator=torch.Generator().manual_seed(0)).tolist()]
        if not rows[0]:
            rows[1], mixed = mixed[: len(mixed) // 5], mixed[len(mixed) // 5 :]
        train = mixed[: options.most]
        write(files.train, train)
        write(files.like, [row for row in train if len(row.get("sentence", "").split()) >= TASKS[name].words])
        write(files.dev, rows[1])
    return files


def read(data: Path, files: tuple[str, ...]) -> Iterator[Row]:
    """Yield the rows of files, with the columns sentence, or sentence1 and sentence2, and label."""
    for file in files:
        if "CoLA" in file:  # its files have no header
            for line in (data / file).read_text(encoding="utf-8").splitlines():
                _, label, _, sentence = line.split("\t")
                yield {"sentence": sentence, "label": label}
            continue
        if "WiC" in file:
            yield from map(in_context, read_table(data / file))
            continue
        table = read_labelled_text(data / file, "calibration")
        for *texts, label in zip(*table.texts, table.labels, strict=True):
            names = ("sentence",) if len(texts) == 1 else ("sentence1", "sentence2")
            yield {**dict(zip(names, texts, strict=True)), "label": label}


def in_context(row: Row) -> Row:
    """A row of WiC with its word before both sentences; some files have all three in one text."""
    if match := WORD_IN_TEXT.fullmatch(str(row.get("text"))):
        row = {**row, **match.groupdict()}
    return {name: f"{row['word']}: {row[name]}" for name in ("sentence1", "sentence2")} | {"label": row["label"]}


def write(path: Path, rows: list[Row]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def measure(folder: Path, name: str, dev: Path) -> dict[str, list[float | None]]:
    """The value of each metric of a task, and its standard error."""
    found = {}
    for metric in TASKS[name].metrics:
        result = evaluate(str(folder), Evaluation(str(dev), 10**6, LENGTH, metric=metric))
        found[metric] = [result.value, result.stderr]
    return found


def score(row: Row) -> float:
    return float(statistics.mean(value for value, _ in row["values"].values()))


def error(rows: list[Row]) -> float:
    """The standard error of the mean over the seeds; of one model that of its examples, as if its metrics agreed."""
    if len({row.get("seed") for row in rows}) > 1:
        return float(statistics.stdev(map(score, rows)) / len(rows) ** 0.5)
    return float(statistics.mean(spread or 0.0 for _, spread in rows[0]["values"].values()))


def markdown(rows: list[Row], methods: list[str]) -> str:
    """A line for each task and one for the mean over the tasks, in percent; a column for each method."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    cells = {(task, method): [row for row in rows if (row["task"], row["method"]) == (task, method)] for task in tasks
             for method in methods}  # fmt: skip
    means = {cell: statistics.mean(map(score, found)) for cell, found in cells.items()}
    errors = {cell: error(found) for cell, found in cells.items()}
    lines = ["| task | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for task in tasks:
        line = [f"{100 * means[task, method]:.1f} ± {100 * errors[task, method]:.1f}" for method in methods]
        lines.append(f"| {task} ({', '.join(TASKS[task].metrics)}) | " + " | ".join(line) + " |")
    average = {method: statistics.mean(means[task, method] for task in tasks) for method in methods}
    spread = {method: sum(errors[task, method] ** 2 for task in tasks) ** 0.5 / len(tasks) for method in methods}
    lines.append("| mean | " + " | ".join(f"{100 * average[m]:.1f} ± {100 * spread[m]:.1f}" for m in methods) + " |")
    if "dense" in methods:
        kept = [f"{100 * average[method] / average['dense']:.1f} %" for method in methods]
        lines.append("| of the dense mean | " + " | ".join(kept) + " |")
    costs = {method: round(statistics.mean(row["core_seconds"] for row in rows if row["method"] == method))
             for method in methods}  # fmt: skip
    lines.append("| core-seconds a model | " + " | ".join(str(costs[method]) for method in methods) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
