"""What methods leave of a language model, measured as in the literature: a Markdown table.

A model is calibrated on documents such as those of C4, and measured on WikiText-2 raw (the whole test part, in windows
of 2048 tokens), on the last --held-back documents of the calibration data, which are kept from the calibration (windows
of 2048 tokens as well), and on zero-shot tasks. The dense model and no permutation are measured as well. Several
--seeds become means with standard deviations. A method may be given options, as in newton:rounds=24.

With --rows the figures of a method are added to a file as soon as they are there, and what the file has is not measured
again. "seconds" are those of the search by the clock, "core-seconds" its processor time, all threads together.
--windows and --limit measure on less, and --bf16 with activations in bfloat16. With --at the texts are measured after
these rounds of a search as well, and a second table has the share of the gap that is closed by then.

python benchmarks/protocol.py --calibration c4.jsonl --wikitext wiki.test.raw --rows protocol.jsonl --methods ria newton
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from quality import data_name, mean_of
from rows import recipe_of
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from permprune import Examples, PruneConfig, TaskList, evaluate_tasks, read_model
from permprune.data.text import load_documents, tokenize
from permprune.engine.held import Held, prepare
from permprune.evaluation.lm_tasks import WIKITEXT, WIKITEXT_ID, WINDOW, average, cut
from permprune.evaluation.perplexity import perplexity
from permprune.evaluation.result import TASK_ACCURACY, Result, gap_closed, metric_named
from permprune.models.processors import tokenizer_of
from permprune.permuters.base import Round
from permprune.system.memory import peak_memory_mb, reset_peak_memory
from permprune.system.progress import log

Row = dict[str, Any]

HELD_BACK = "held back"
"""The name of the text that is kept from the calibration, in rows."""

STORED = ("task", "value", "count", "stderr", "unit")
"""What a row has of a result beside the metric."""

MOST = 10**6
"""More windows than any of the texts has."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=["ria", "newton"])
    parser.add_argument("--modes", nargs="+", default=[PruneConfig.mode])
    parser.add_argument("--patterns", nargs="+", default=[PruneConfig.pattern])
    parser.add_argument("--seeds", nargs="+", type=int, default=[PruneConfig.seed])
    parser.add_argument("--saliency", default=PruneConfig.saliency)
    parser.add_argument("--update", default=PruneConfig.update)
    parser.add_argument("--calibration", help="documents, the last of which are held back (default: the default text)")
    parser.add_argument("--held-back", type=int, default=100, help="documents kept from the calibration")
    parser.add_argument("--wikitext", type=Path, help="file of WikiText-2's raw test text (default: the hub)")
    parser.add_argument("--tasks", nargs="*", default=[], help="tasks of lm-eval")
    parser.add_argument("--limit", type=int, help="examples per task (default: all)")
    parser.add_argument("--windows", type=int, help="windows of each text (default: all)")
    parser.add_argument("--minutes", type=float, help="time limit of a search")
    parser.add_argument("--at", nargs="*", type=int, default=[], help="rounds after which texts are measured as well")
    parser.add_argument("--bf16", action="store_true", help="measure in bfloat16")
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    options = parser.parse_args()
    lines = options.rows.read_text().splitlines() if options.rows and options.rows.exists() else []
    known = [json.loads(line) for line in lines]
    table: list[Row] = []
    for pattern, mode, seed in itertools.product(options.patterns, options.modes, options.seeds):
        config = PruneConfig(
            pattern=pattern,
            mode=mode,
            seed=seed,
            saliency=options.saliency,
            update=options.update,
            minutes=options.minutes,
        )
        table += [row for row in rows_of(options, config, known) if row not in table]
    print(markdown(table))
    if options.at:
        print(f"\n{curves(table)}")


def rows_of(options: argparse.Namespace, config: PruneConfig, known: list[Row]) -> list[Row]:
    """A row for each method: those known, and the others measured and added to them and to the file."""
    cells = cells_of(options, config)
    missing = [method for method, cell in cells.items() if not matching(known, cell)]
    if missing:
        for method, found in measure(options, config, missing):
            known.append(cells[method] | found)
            log.info("%s", known[-1])
            if options.rows:
                with options.rows.open("a") as file:
                    file.write(json.dumps(known[-1]) + "\n")
    return [matching(known, cell)[0] for cell in cells.values()]


def cells_of(options: argparse.Namespace, config: PruneConfig) -> dict[str, Row]:
    """What the figures of each method depend on: neither the dense model nor no permutation depends on the mode."""
    asked = ("model", "held_back", "windows", "tasks", "limit")
    dense = {name: getattr(options, name) for name in asked} | {
        "calibration": data_name(options.calibration),
        "precision": "bf16" if options.bf16 else "fp32",
    }
    none = dense | {name: getattr(config, name) for name in ("pattern", "saliency", "update", "seed")}
    searched = none | {"mode": config.mode, "minutes": config.minutes}
    cells = {"dense": dense, "none": none} | dict.fromkeys(options.methods, searched)
    return {method: cell | {"method": method} for method, cell in cells.items()}


def matching(rows: list[Row], cell: Row) -> list[Row]:
    """The rows of these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in cell.items())]


def measure(options: argparse.Namespace, config: PruneConfig, methods: list[str]) -> Iterator[tuple[str, Row]]:
    """Yield the figures of each of the methods, with its name."""
    model, processor, _ = read_model(options.model)
    tokenizer = tokenizer_of(processor)
    documents = load_documents(options.calibration, "calibration")
    last = max(0, len(documents) - options.held_back)
    shown, kept = documents[:last], documents[last:]
    score = scorer(options, model, tokenizer, kept)
    *others, _ = config.shares(config.samples)
    windows = tokenize(shown, tokenizer, config.length, config.samples, config.seed, fewer=True, apart=sum(others))
    held = Held(prepare(model, processor, config, examples=Examples.of(windows)), processor)
    if "dense" in methods:
        with held.dense():
            yield "dense", score()
    for method in methods:
        if method != "dense":
            reset_peak_memory()
            curve = Curve(options.at, score)
            run = dataclasses.replace(held.plan.run, callbacks=(curve,))
            solution = held.run(recipe_of(method), run)
            cost = {"seconds": round(solution.seconds), "core_seconds": round(curve.spent()), "curve": curve.points}
            yield method, score() | cost | {"peak": round(peak_memory_mb() or 0)}


class Curve:
    """A callback that measures the texts after some of the rounds of a search."""

    def __init__(self, rounds: list[int], score: Callable[..., Row]) -> None:
        self.rounds, self.score, self.points = rounds, score, list[Row]()
        self.began, self.measuring = time.process_time(), 0.0

    def __call__(self, last: Round) -> None:
        if last.number in self.rounds:
            spent = self.spent()
            texts = self.score(texts_only=True)["texts"]
            self.points.append({"round": last.number, "core_seconds": round(spent), "texts": texts})
            self.measuring = time.process_time() - self.began - spent

    def spent(self) -> float:
        """The processor time of the search so far."""
        return time.process_time() - self.began - self.measuring


def scorer(
    options: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kept: list[str]
) -> Callable[..., Row]:
    """A function that measures the model with its current weights: on each text and, unless `texts_only`, each task."""
    texts = {WIKITEXT: cut(wikitext2(options.wikitext), tokenizer, WINDOW)[: options.windows]}
    if kept:
        texts[HELD_BACK] = tokenize(kept, tokenizer, WINDOW, options.windows or MOST, fewer=True)
    tasks = TaskList(tuple(options.tasks), limit=options.limit)

    def score(texts_only: bool = False) -> Row:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=options.bf16):
            results = {name: row_of(perplexity(model, windows, batch=1)) for name, windows in texts.items()}
            found = evaluate_tasks(model, tasks, tokenizer) if tasks.names and not texts_only else []
            return {"texts": results, "results": [row_of(own) for own in found]}

    return score


def wikitext2(file: Path | None) -> str:
    """The test part of WikiText-2, its lines joined by blank lines as in GPTQ, SparseGPT and Wanda."""
    if file is None:
        return load_documents(WIKITEXT_ID, "evaluation")[0]
    lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)


def row_of(result: Result) -> Row:
    return {**{name: getattr(result, name) for name in STORED}, "metric": result.metric.name}


def result_of(row: Row) -> Result:
    return Result(**{**row, "metric": metric_named(row["metric"])})


def markdown(rows: list[Row]) -> str:
    """Rows that differ in their seeds only make one line: perplexities, gaps closed, and "acc" of tasks in percent."""
    tasks, texts = rows[0]["tasks"], list(rows[0]["texts"])
    heads = ["pattern", "mode", "method", *itertools.chain(*((text, "gap closed") for text in texts)), *tasks]
    heads += ["mean acc"] * bool(tasks) + ["seconds", "core-seconds", "peak MiB"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key, "") for key in ("pattern", "mode", "method")), []).append(row)
    dense = next(row for row in rows if row["method"] == "dense")
    for group, seeds in groups.items():
        cells = list(group)
        for text in texts:
            cells.append(mean_of([row["texts"][text]["value"] for row in seeds], 2))
            cells.append(mean_of([100 * gap_of(row, text, dense, rows) for row in seeds], 1) + " %")
        cells += [mean_of([100 * own for own in found], 1) for found in zip(*map(accuracies, seeds), strict=True)]
        for key in ("seconds", "core_seconds", "peak"):
            cells.append("" if group[2] == "dense" else f"{statistics.mean(row[key] for row in seeds):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curves(rows: list[Row]) -> str:
    """The share of the gap closed on each text after the rounds of --at."""
    texts = list(rows[0]["texts"])
    dense = next(row for row in rows if row["method"] == "dense")
    lines = [
        "| " + " | ".join(["method", "seed", "round", "core-seconds", *texts]) + " |",
        "|---" * (4 + len(texts)) + "|",
    ]
    for row in rows:
        for point in row.get("curve", []):
            gaps = [f"{100 * gap_of(row | point, text, dense, rows):.1f} %" for text in texts]
            cells = [row["method"], row["seed"], point["round"], point["core_seconds"], *gaps]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def gap_of(row: Row, text: str, dense: Row, rows: list[Row]) -> float:
    """The share of the gap that a row closes on a text; the gap is that of its own pattern and seed."""
    if row is dense:
        return 1.0
    none = next(
        other
        for other in rows
        if other["method"] == "none" and matching([other], {k: row[k] for k in ("pattern", "seed")})
    )
    return gap_closed(*(own["texts"][text]["value"] for own in (row, dense, none))) or 0.0


def accuracies(row: Row) -> list[float]:
    """ "acc" of every task, or its first metric if it has none, and the mean of "acc"; empty without tasks."""
    results = [result_of(own) for own in row["results"]]
    each = [[own for own in results if own.task == task] for task in row["tasks"]]
    chosen = [next((own for own in found if own.metric == TASK_ACCURACY), found[0]) for found in each]
    mean = average(chosen)
    return [own.value for own in [*chosen, *([mean] if mean else [])]]


if __name__ == "__main__":
    main()
