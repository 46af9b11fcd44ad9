"""What a mix of patterns is worth: one pattern for all layers beside mixes that keep as many weights.

Every row has the same search. Language models are measured by perplexity, models that return hidden states by the
distance to the dense model's, on each of --data.

python benchmarks/budgets.py smollm2-135m --calibration c4.jsonl --data other.jsonl --data wiki.test.raw \
    --patterns 2:4,4:8,mixed@0.5,5:8,mixed@0.625 --rows docs/results/budgets.jsonl
"""

import argparse
import contextlib
import time
from collections import Counter
from pathlib import Path

import rows

from permprune.config import PruneConfig
from permprune.engine.held import Held
from permprune.engine.measuring import Evaluation, Meter
from permprune.jobs.cells import of_pattern
from permprune.zoo.models import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--patterns", default="2:4,4:8,mixed@0.5,5:8,mixed@0.625")
    parser.add_argument("--order", default="none")
    parser.add_argument("--mode", choices=("fold", "gather"), default="fold")
    parser.add_argument("--calibration")
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40, help="of each data")
    parser.add_argument("--rows", type=Path, help="file of figures")
    options = parser.parse_args()
    source = resolve_model(options.model)
    settings = {"mode": options.mode, "samples": options.samples, "length": options.length}
    config = PruneConfig(calibration=options.calibration, order=options.order, **settings)
    for pattern in ["dense", *options.patterns.split(",")]:
        began = time.process_time()
        held = Held.open(source, config if pattern == "dense" else of_pattern(config, pattern))
        with held.dense():
            meters = [
                Meter(held.model, held.processor, Evaluation(data, options.windows, options.length))
                for data in options.data
            ]
        if pattern != "dense":
            held.run(rows.recipe_of(options.order), held.plan.run)
        with held.dense() if pattern == "dense" else contextlib.nullcontext():
            results = [meter()[0] for meter in meters]
        seconds = time.process_time() - began
        mix = held.mix
        cell = {"table": "budgets", "model": options.model, "order": options.order, "pattern": pattern} | settings
        figures = {Path(data).stem: result.value for data, result in zip(options.data, results, strict=True)}
        figures |= {"metric": results[0].metric.name, "count": [result.count for result in results]}
        figures |= {"keep": mix.keep, "layers": Counter(mix.layers.values())} if mix else {}
        print(cell | figures | {"core-seconds": round(seconds)}, flush=True)
        rows.add(options.rows, cell, figures | {"core-seconds": round(seconds)})
        held.restore()


if __name__ == "__main__":
    main()
