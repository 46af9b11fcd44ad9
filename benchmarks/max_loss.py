"""What `--max-loss` keeps: a mix of patterns for each seed, and what it loses on examples that the run never saw.

Each run chooses on the first half of --data and confirms on the second. The dense and the pruned model are then
measured on --unseen.

python benchmarks/max_loss.py minilm-sst2 --calibration sentences.tsv --data chosen.tsv --unseen unseen.tsv \
    --length 128 --seeds 0 1 2 --out runs --rows docs/results/budgets.jsonl
"""

import argparse
import time
from collections import Counter
from pathlib import Path

import rows

from permprune import Evaluation, PruneConfig, evaluate, prune_to_folder
from permprune.engine.limiting import loss_of
from permprune.errors import PermpruneError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--max-loss", type=float, default=0.01, help="a share of the measure")
    parser.add_argument("--order", help="the search; that of the effort if absent")
    parser.add_argument("--effort", default="order")
    parser.add_argument("--mode", choices=("fold", "gather"), default="fold")
    parser.add_argument("--calibration")
    parser.add_argument("--data", required=True, help="to choose and to confirm on")
    parser.add_argument("--unseen", required=True, help="to measure on")
    parser.add_argument("--windows", type=int, default=64, help="of the data, and of the unseen data")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--samples", type=int, help="windows to calibrate on; the default if absent")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="folder for the pruned models")
    parser.add_argument("--rows", type=Path, help="file of figures")
    options = parser.parse_args()
    unseen = Evaluation(options.unseen, options.windows, options.length)
    dense = evaluate(options.model, unseen)
    search = {"order": options.order} if options.order else {"effort": options.effort}
    search |= {"samples": options.samples} if options.samples else {}
    shared = search | {"mode": options.mode, "length": options.length, "max_loss": options.max_loss}
    for seed in options.seeds:
        out, began = options.out / f"seed-{seed}", time.process_time()
        config = PruneConfig(calibration=options.calibration, pattern="mixed", seed=seed, **shared)
        evaluation = Evaluation(options.data, options.windows, options.length)
        try:
            record = prune_to_folder(options.model, out, config, evaluation=evaluation)
        except PermpruneError as error:
            print(f"seed {seed}: {error}", flush=True)
            continue
        seconds, pruned = time.process_time() - began, evaluate(out, unseen)
        mix = record.mix
        assert mix is not None
        cell = {"table": "max-loss", "model": options.model, "seed": seed} | shared
        figures = {"metric": dense.metric.name, "count": dense.count, "dense": dense.value, "pruned": pruned.value}
        figures |= {"loss": loss_of(pruned, dense), "keep": mix.keep, "layers": Counter(mix.layers.values())}
        figures |= {"attempts": len(mix.attempts), "core-seconds": round(seconds)}
        print(cell | figures, flush=True)
        rows.add(options.rows, cell, figures)


if __name__ == "__main__":
    main()
