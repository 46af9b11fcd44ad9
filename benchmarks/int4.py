"""What int4 values cost after training: a pruned language model, trained further once in fp32 and once through int4.

Both trainings are those of `permprune finetune`, with the same text, steps, learning rate and teacher, and differ in
the type in which their weights are packed. Perplexity is over windows of --test. Prints a Markdown table: bits for each
weight of the pruned layers, kept or not, MB of all weights, and perplexity, also relative to the first of --types.

python benchmarks/int4.py PRUNED --teacher smollm2-135m --text c4.jsonl --test other.jsonl
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

from rows import add

from permprune import Evaluation, FineTuning, evaluate, finetune, load
from permprune.evaluation.size import stored_bytes
from permprune.kernels.product.module import PackedLinear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", help="folder of the pruned model, unpacked")
    parser.add_argument("--teacher", required=True, help="the dense model")
    parser.add_argument("--text", required=True, help="text to train on")
    parser.add_argument("--test", required=True, help="text that no model was trained on")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2, help="windows in a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window of training")
    parser.add_argument("--windows", type=int, default=40, help="windows of 512 tokens to test on")
    parser.add_argument("--types", nargs="+", default=["fp32", "int4"])
    parser.add_argument("--keep", type=Path, help="folder that keeps the trained models")
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    options = parser.parse_args()
    count = options.steps * options.batch
    training = FineTuning(
        options.text,
        teacher=options.teacher,
        rows=round(count / 0.9),  # a tenth is held out
        batch=options.batch,
        length=options.length,
        epochs=1,
    )
    test = Evaluation(options.test, windows=options.windows)
    print("| values | bits a weight | MB | perplexity | relative |\n|---|---|---|---|---|", flush=True)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in options.types:
            folder = (options.keep or Path(scratch)) / dtype
            if not folder.exists():
                finetune(options.pruned, folder, dataclasses.replace(training, pack=dtype))
            result = evaluate(folder, test)
            found[dtype] = result.value
            model = load(folder)
            packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
            weights = sum(layer.in_features * layer.out_features for layer in packed)
            bits = 8 * sum(map(stored_bytes, packed)) / weights
            size, ratio = stored_bytes(model), result.value / found[options.types[0]]
            print(f"| {dtype} | {bits:.2f} | {size / 1e6:.0f} | {result.value:.2f} | {ratio:.4f} |", flush=True)
            cell = {"table": "int4", "model": options.teacher, "values": dtype, "steps": options.steps}
            cell |= {"tokens_a_step": options.batch * options.length}
            figures = {"bits": bits, "bytes": size, "perplexity": result.value, "ratio": ratio, "tokens": result.count}
            add(options.rows, cell, figures)


if __name__ == "__main__":
    main()
