"""Rows of figures in a file, one JSON object a line, each with the version of permprune, the machine and the date.

As a script, adds what `permprune bench --json` wrote: a row for each model, batch size and length of the prompt. Models
have the names of their folders, with spaces for hyphens. With --types instead a row for each type, batch size and
speed: the dense model of the type beside the fastest packed one that runs in it.

permprune bench packed-bf16/ --batch 1 --context 128,512 --json bench.json
python benchmarks/rows.py bench.json --model SmolLM2-135M --rows docs/results/speed.jsonl
"""

import argparse
import datetime
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import permprune
from permprune.config import PruneConfig
from permprune.kernels import library
from permprune.recipe import Recipe

Row = dict[str, Any]


def recipe_of(method: str) -> Recipe:
    """The recipe of a method in a table: "newton:rounds=6", or with an update and training "ria+admm+steps=60"."""
    order, change, train = [*method.split("+"), "none", "none"][:3]
    return PruneConfig(order=order, update=change, train=train).recipe


def machine() -> str:
    """The processor's name, its number of cores, and the kernels that it runs."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {library.best().name}"


def add(path: Path | None, cell: Row, measured: Row) -> None:
    """Add a row to a file, in place of an earlier one with the values of `cell`; without a path, do nothing."""
    if path is None:
        return
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    others = [line for line in lines if not cell.items() <= json.loads(line).items()]
    about = {"version": permprune.__version__, "machine": machine(), "date": datetime.date.today().isoformat()}
    path.write_text("\n".join([*others, json.dumps(cell | measured | about), ""]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path, help="what permprune bench --json wrote")
    parser.add_argument("--model", required=True, help="the name of the dense model in the table")
    parser.add_argument("--rows", type=Path, required=True, help="file of figures")
    parser.add_argument("--types", action="store_true", help="compare dense and packed models of one type")
    options = parser.parse_args()
    bench = json.loads(options.bench.read_text(encoding="utf-8"))
    if options.types:
        add_types(bench, options.model, options.rows)
        return
    dense = next(row["bytes"] for row in bench["rows"] if row["dense"] and row["name"].endswith("(bf16)"))
    for row in bench["rows"]:
        dtype = re.search(r" \((\w+)\)$", row["name"])
        weights = f"dense {dtype[1]}" if dtype and row["dense"] else Path(row["name"]).name.replace("-", " ")
        shared = {"table": "models", "model": options.model, "threads": bench["threads"], "weights": weights}
        for speed in row["speeds"]:
            cell = shared | {name: speed.pop(name) for name in ("batch", "context")}
            figures = {"bytes": row["bytes"], "size": row["bytes"] / dense, "resident": row["resident"]}
            add(options.rows, cell, figures | speed)


def add_types(bench: Row, model: str, path: Path) -> None:
    """Add the speeds of the dense model in fp32 and bf16 beside those of the fastest packed model of the type."""
    kernels, shared = library.best().name, {"table": "types", "model": model, "threads": bench["threads"]}
    for dtype in ("fp32", "bf16"):
        dense = next(row for row in bench["rows"] if row["dense"] and row["name"].endswith(f"({dtype})"))
        packed = [row for row in bench["rows"] if not row["dense"] and runs_in(row, dtype)]
        for number, speed in enumerate(dense["speeds"]):
            for rate in {"prefill", "decode", "items"} & speed.keys():
                best = max(row["speeds"][number][rate] for row in packed)
                texts = f" of {speed['context']} tokens" if speed["context"] else ""
                cell = {"kernels": kernels, "measured": f"{rate}, {speed['batch']}{texts}", "type": dtype}
                add(path, shared | cell, {"dense": speed[rate], "packed": best, "times": best / speed[rate]})


def runs_in(row: Row, dtype: str) -> bool:
    """Whether a row of a packed model is of activations of this type: fp32, unless its name says bf16."""
    return (dtype == "bf16") == (row["name"].endswith("(bf16)") or Path(row["name"]).name.endswith("bf16"))


if __name__ == "__main__":
    main()
