"""What each permuter loses: a Markdown table over patterns, saliencies, modes and methods, on the same masks and data.

Every search is tested on each source of --data, so that text of another domain than the calibration's can stand among
them; the metric is the one that suits the model. With several --seeds the figures are means, with standard deviations.
A method may be given options, as in newton:rounds=24, and a mix a share, as in mixed@0.6. With --rows every figure is
added to a file as soon as it is there, and what the file has is not measured again. --bf16 measures with activations in
bfloat16, which is faster where the CPU or GPU has it and moves an accuracy by a few thousandths.

"core-seconds" are the processor time of the search, all threads together: on a machine that does other work meanwhile
they say more than the clock does.

python benchmarks/quality.py --calibration wiki.valid.tokens --data wiki.test.tokens c4.jsonl --windows 12
torchrun --nproc-per-node 2 benchmarks/quality.py ...    # the same from two processes
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rows import recipe_of

from permprune import PruneConfig, read_model
from permprune.engine.held import Held, prepare
from permprune.engine.measuring import Evaluation, Meter
from permprune.evaluation.result import gap_closed, metric_named
from permprune.jobs.cells import of_pattern
from permprune.system import distributed
from permprune.system.device import compute_device
from permprune.system.memory import peak_memory_mb, reset_peak_memory
from permprune.system.progress import log

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=["ria", "cp", "reconstruction", "newton", "learned"])
    parser.add_argument("--modes", nargs="+", default=["fold", "gather"])
    parser.add_argument("--patterns", nargs="+", default=["2:4"])
    parser.add_argument("--saliencies", nargs="+", default=["wanda"])
    parser.add_argument("--updates", nargs="+", default=["none"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--calibration", help="data to calibrate on (default: the default data)")
    parser.add_argument("--data", nargs="+", default=[None], help="data to test on (default: the default data)")
    parser.add_argument("--windows", type=int, default=24, help="windows of 512 tokens, or of 32 examples")
    parser.add_argument("--bf16", action="store_true", help="measure in bfloat16")
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    options = parser.parse_args()
    known = [json.loads(line) for line in options.rows.open()] if options.rows and options.rows.exists() else []
    table = []
    for pattern, name, update, mode in itertools.product(
        options.patterns, options.saliencies, options.updates, options.modes
    ):
        config = PruneConfig(saliency=name, mode=mode, update=update, calibration=options.calibration)
        for seed in options.seeds:
            table += rows_of(options, of_pattern(config.replace(seed=seed), pattern), pattern, known)
    if not distributed.rank():
        print(markdown(table))


def rows_of(options: argparse.Namespace, config: PruneConfig, pattern: str, known: list[Row]) -> list[Row]:
    """A row for each method: those known, and the others measured and added to them and to the file."""
    shared = {
        "model": options.model,
        "calibration": data_name(config.calibration),
        "windows": options.windows,
        "precision": "bf16" if options.bf16 else "fp32",
    }
    cell = shared | {
        "pattern": pattern,
        "mask": config.saliency if config.update == "none" else f"{config.saliency} + {config.update}",
        "mode": config.mode,
        "seed": config.seed,
    }
    tests = {data_name(source) for source in options.data}
    tested = [row for row in known if tests <= set(row["gap"])]
    wanted = ["dense", "none", *options.methods]
    rows = matching(tested, cell)
    if missing := set(wanted) - {row["method"] for row in rows}:
        dense = next((row for row in matching(tested, shared) if row["method"] == "dense"), None)
        for found in measure(options, config, missing, dense):
            rows.append(cell | found)
            known.append(rows[-1])
            if not distributed.rank():
                log.info("%s", rows[-1])
                if options.rows:
                    with options.rows.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    return sorted((row for row in rows if row["method"] in wanted), key=lambda row: wanted.index(row["method"]))


def matching(rows: list[Row], cell: Row) -> list[Row]:
    """The rows of these values; those that do not tell their precision were measured in fp32."""
    return [row for row in rows if all(({"precision": "fp32"} | row)[key] == value for key, value in cell.items())]


def measure(options: argparse.Namespace, config: PruneConfig, wanted: set[str], known: Row | None) -> Iterator[Row]:
    """Yield the rows of the methods wanted; `known` is a row of the dense model on the same data, if there is one."""
    model, processor, _ = read_model(options.model)
    runs = {data_name(source): Evaluation(source, options.windows).beside(config) for source in options.data}
    config = config.replace(shared=any(own.shared for own, _ in runs.values()))
    held = Held(prepare(model, processor, config), processor)

    def score() -> tuple[dict[str, float], str]:
        with torch.autocast(compute_device(model).type, torch.bfloat16, enabled=options.bf16):
            results = {name: meter()[0] for name, meter in meters.items()}
        return {name: result.value for name, result in results.items()}, next(iter(results.values())).metric.name

    with held.dense():
        meters = {name: Meter(model, processor, evaluation) for name, (_, evaluation) in runs.items()}
        dense, metric = (known["value"], known["metric"]) if known else score()
    row = {"metric": metric, "method": "dense", "value": dense, "gap": dict.fromkeys(dense, 1.0)}
    if "dense" in wanted:
        yield row | {"seconds": 0, "core_seconds": 0, "peak": 0}
    none: dict[str, float] = {}
    for method in ["none", *options.methods]:
        if method in wanted or method == "none":
            reset_peak_memory()
            began = time.process_time()
            solution = held.run(recipe_of(method), held.plan.run)
            cost = {"seconds": round(solution.seconds), "core_seconds": round(time.process_time() - began)}
            found, _ = score()
            none = none or found
            gap = {
                name: gap_closed(found[name], dense[name], none[name], metric=metric_named(metric)) for name in found
            }
            if method in wanted:
                yield row | {"method": method, "value": found, "gap": gap, **cost, "peak": round(peak_memory_mb() or 0)}


def markdown(rows: list[Row]) -> str:
    """Rows that differ in their seeds only make one line."""
    tests, metric = list(rows[0]["gap"]), rows[0]["metric"]
    digits = 2 if metric == "perplexity" else 4
    heads = ["pattern", "mask", "mode", "calibrated on", "method"]
    heads += [head for test in tests for head in (f"{metric}, {test}", "gap closed")] + ["core-seconds", "peak MiB"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    keys = ("pattern", "mask", "mode", "calibration", "method")
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for group, seeds in groups.items():
        cells = list(group)
        for test in tests:
            cells.append(mean_of([row["value"][test] for row in seeds], digits))
            cells.append(mean_of([100 * (row["gap"][test] or 0.0) for row in seeds], 1) + " %")
        cells += [f"{statistics.mean(row[key] for row in seeds):.0f}" for key in ("core_seconds", "peak")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_of(values: list[float], digits: int) -> str:
    """The mean of several seeds with their standard deviation, if they differ."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def data_name(source: str | None) -> str:
    return Path(source).name if source else "default data"


if __name__ == "__main__":
    with distributed.processes():
        main()
