"""What each weight update brings at the same orders: a Markdown table over permuters and updates.

Each permuter searches once, and every update starts from its orders. With --state an interrupted run continues with the
searches that it finished, and with --rows it does not measure a row again.

python benchmarks/updates.py --calibration c4.jsonl --data wiki.test.raw c4-unseen.jsonl \
    --methods none ria newton:rounds=2 --updates none sparsegpt admm
"""

import argparse
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from permprune import PruneConfig, read_model
from permprune.evaluation.result import gap_closed, metric_named
from permprune.jobs.trials import Evaluation, Meter
from permprune.permuters.registry import permuter
from permprune.pipeline import prepare
from permprune.system.device import autocast, compute_device
from permprune.system.progress import log
from permprune.updates.registry import update
from permprune.updates.share import update_network

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=["none", "ria", "newton:rounds=2"])
    parser.add_argument("--updates", nargs="+", default=["none", "sparsegpt", "admm"])
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--mode", default="fold")
    parser.add_argument("--calibration", help="data to calibrate on (default: the default data)")
    parser.add_argument("--data", nargs="+", default=[None], help="data to test on (default: the default data)")
    parser.add_argument("--windows", type=int, default=8, help="windows to test on, of each source")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a window to test on")
    parser.add_argument("--bf16", action="store_true", help="measure in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, help="folder for the searches' states and results")
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    cell = {
        "model": options.model,
        "pattern": options.pattern,
        "mode": options.mode,
        "calibration": data_name(options.calibration),
        "tested": {data_name(source): [options.windows, options.length] for source in options.data},
        "precision": "bf16" if options.bf16 else "fp32",
        "seed": options.seed,
    }
    known = [json.loads(line) for line in options.rows.open()] if options.rows and options.rows.exists() else []
    rows = [row for row in known if cell.items() <= row.items()]
    for found in measure(options, rows):
        rows.append(cell | found)
        log.info("%s", rows[-1])
        if options.rows:
            with options.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(markdown(options, rows))


def measure(options: argparse.Namespace, rows: list[Row]) -> Iterator[Row]:
    """Yield the rows that are not among `rows`, to which the caller appends each."""
    wanted = [("dense", "none"), ("none", "none")]
    wanted += [(method, name) for method in options.methods for name in options.updates]
    missing = [pair for pair in dict.fromkeys(wanted) if row_of(rows, *pair) is None]
    if not missing:
        return
    config = PruneConfig(pattern=options.pattern, mode=options.mode, calibration=options.calibration, seed=options.seed)
    model, processor, _ = read_model(options.model)
    prepared = prepare(model, processor, config, partial=options.state)
    network, run = prepared.network, prepared.run
    with network.dense_weights():
        meters = {
            data_name(source): Meter(model, processor, Evaluation(source, options.windows, options.length))
            for source in options.data
        }

    def score() -> dict[str, float]:
        with autocast(compute_device(model), torch.bfloat16 if options.bf16 else torch.float32):
            return {name: meter().value for name, meter in meters.items()}

    for method, name in missing:
        began = time.process_time()
        if method == "dense":
            with network.dense_weights():
                yield {"method": method, "update": name, "value": score(), "core_seconds": 0}
            continue
        permuter(method).solve(network, run)
        searched = time.process_time()
        update_network(update(name), network, prepared.measured, run.held_out)
        cost = {"search_core_seconds": round(searched - began), "core_seconds": round(time.process_time() - searched)}
        yield {"method": method, "update": name, "value": score(), **cost}


def row_of(rows: list[Row], method: str, name: str) -> Row | None:
    return next((row for row in rows if (row["method"], row["update"]) == (method, name)), None)


def markdown(options: argparse.Namespace, rows: list[Row]) -> str:
    """A line for each permuter and update; the gap is that between the dense model and `none` without an update."""
    tests = [data_name(source) for source in options.data]
    heads = ["method", "update", *(head for test in tests for head in (f"perplexity, {test}", "gap closed"))]
    lines = ["| " + " | ".join([*heads, "core-seconds"]) + " |", "|---" * (len(heads) + 1) + "|"]
    dense, none = (row_of(rows, method, "none") for method in ("dense", "none"))
    assert dense and none
    for method, name in dict.fromkeys((row["method"], row["update"]) for row in rows):
        row = row_of(rows, method, name)
        assert row
        cells = [method, name]
        for test in tests:
            value = row["value"][test]
            closed = gap_closed(value, dense["value"][test], none["value"][test], metric=metric_named("perplexity"))
            cells += [f"{value:.2f}", f"{100 * (closed or 0.0):.1f} %"]
        lines.append("| " + " | ".join([*cells, str(row["core_seconds"])]) + " |")
    return "\n".join(lines)


def data_name(source: str | None) -> str:
    return Path(source).name if source else "default data"


if __name__ == "__main__":
    main()
