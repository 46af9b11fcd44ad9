"""What int4 values cost: a pruned language model, packed as bf16 and as int4, rounded and solved on --text.

With a --teacher, the dense model, it is also trained further, once with weights in bf16 and once through int4, as by
`permprune finetune` and with the same text, steps, learning rate and teacher. Perplexity is over windows of --test.
Prints a Markdown table: bits for each weight of the pruned layers, kept or not, MB of all weights, and perplexity, also
relative to bf16 with the same training.

python benchmarks/int4.py PRUNED --text c4.jsonl --test other.jsonl --teacher smollm2-135m
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rows import add

from permprune import Evaluation, FineTuning, PruneConfig, evaluate, finetune, load, pack_folder
from permprune.evaluation.size import stored_bytes
from permprune.kernels.product.module import PackedLinear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", help="folder of the pruned model, unpacked")
    parser.add_argument("--text", required=True, help="text to solve and to train on")
    parser.add_argument("--test", required=True, help="text that no model was trained on")
    parser.add_argument("--windows", type=int, default=40, help="windows of 512 tokens to test on")
    parser.add_argument("--teacher", help="the dense model, for the trainings")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2, help="windows in a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window of training")
    parser.add_argument("--keep", type=Path, help="folder that keeps the models")
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    options = parser.parse_args()
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    test = Evaluation(options.test, windows=options.windows)
    print("| values | bits a weight | MB | perplexity | relative | seconds |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for ways in comparisons(options):
            base = None
            for values, make in ways.items():
                folder = (options.keep or Path(scratch)) / values.replace(", ", "-")
                began = time.process_time()
                if not folder.exists():
                    make(folder)
                seconds = time.process_time() - began
                result = evaluate(folder, test)
                base = base or result.value
                figures = {**sizes(folder), "perplexity": result.value, "ratio": result.value / base}
                bits, size, ratio = figures["bits"], figures["bytes"], figures["ratio"]
                row = f"{values} | {bits:.2f} | {size / 1e6:.0f} | {result.value:.2f} | {ratio:.4f} | {seconds:.0f}"
                print(f"| {row} |", flush=True)
                cell = {"table": "int4", "model": Path(options.pruned).name, "values": values}
                add(options.rows, cell, {**figures, "tokens": result.count, "core_seconds": seconds})


def comparisons(options: argparse.Namespace) -> list[dict[str, Callable[[Path], object]]]:
    """Return how to write the folders of each comparison, by what they are; the first of each has values in bf16."""
    pack = partial(pack_folder, options.pruned)
    calibration = PruneConfig(calibration=options.text)
    packed: dict[str, Callable[[Path], object]] = {
        "bf16": partial(pack, dtype="bf16"),
        "int4, rounded": partial(pack, dtype="int4"),
        "int4": partial(pack, dtype="int4", calibration=calibration),
    }
    if options.teacher is None:
        return [packed]
    training = FineTuning(
        options.text,
        teacher=options.teacher,
        rows=round(options.steps * options.batch / 0.9),  # a tenth is held out
        batch=options.batch,
        length=options.length,
        epochs=1,
    )

    def train(dtype: str, folder: Path) -> None:
        finetune(options.pruned, folder, dataclasses.replace(training, pack=dtype))

    return [packed, {f"{dtype}, trained": partial(train, dtype) for dtype in ("bf16", "int4")}]


def sizes(folder: Path) -> dict[str, float]:
    """Return the bits of each weight of the packed layers, and the bytes of all weights."""
    model = load(folder)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in packed)
    return {"bits": 8 * sum(map(stored_bytes, packed)) / weights, "bytes": stored_bytes(model)}


if __name__ == "__main__":
    main()
