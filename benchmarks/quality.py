"""What each permuter loses: a Markdown table over patterns, saliencies, modes and methods, on the same masks and data.

Every search is tested on each text of --data, so that text of another domain than the calibration's can stand among
them. With several --seeds the figures are means, with the standard deviation of the gap closed.

python benchmarks/quality.py --calibration wiki.valid.tokens --data wiki.test.tokens c4.jsonl --windows 12
torchrun --nproc-per-node 2 benchmarks/quality.py ...    # the same from two processes
"""

import argparse
import dataclasses
import itertools
import statistics
from pathlib import Path

from permprune import Evaluation, Settings, parallel, perplexity, read_model
from permprune.permuters import permuter
from permprune.pipeline import gap_closed, prepare, update_weights
from permprune.resources import peak_memory_mb, reset_peak_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=["ria", "cp", "reconstruction", "newton", "learned"])
    parser.add_argument("--modes", nargs="+", default=["fold", "gather"])
    parser.add_argument("--patterns", nargs="+", default=["2:4"])
    parser.add_argument("--saliencies", nargs="+", default=["wanda"])
    parser.add_argument("--updates", nargs="+", default=["none"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--calibration", help="text to calibrate on; the default one if absent")
    parser.add_argument("--data", nargs="+", default=[None], help="texts to test on; the default one if absent")
    parser.add_argument("--windows", type=int, default=24, help="windows of 512 tokens of each text")
    parser.add_argument("--rounds", type=int, help="of the trust-region searches; their own if absent")
    options = parser.parse_args()
    texts = [Path(source).name if source else "default text" for source in options.data]
    heads = [head for text in texts for head in (f"{text} perplexity", "gap closed")]
    say("| pattern | mask | mode | method |", *(f"{head} |" for head in [*heads, "seconds", "peak MiB"]))
    say("|---" * (6 + len(heads)) + "|")
    for pattern, name, update, mode in itertools.product(
        options.patterns, options.saliencies, options.updates, options.modes
    ):
        settings = Settings(pattern=pattern, saliency=name, mode=mode, update=update, calibration=options.calibration)
        rows: dict[str, list[list[float]]] = {}
        for seed in options.seeds:
            for method, figures in measure(options, dataclasses.replace(settings, seed=seed)):
                rows.setdefault(method, []).append(figures)
                if len(rows[method]) == len(options.seeds):
                    mask = name if update == "none" else f"{name} + {update}"
                    say(f"| {pattern} | {mask} | {mode} | {method} |", *cells(rows[method]))


def measure(options: argparse.Namespace, settings: Settings):
    """Yield (method, [perplexity and gap closed of each text, seconds, peak MiB]); dense and none come first."""
    model, tokenizer, _ = read_model(options.model)
    texts = [Evaluation(source, options.windows).tokens(tokenizer) for source in options.data]
    prepared = prepare(model, tokenizer, settings)

    def perplexities() -> list[float]:
        return [perplexity(model, tokens).value for tokens in texts]

    with prepared.network.dense_weights():
        dense = perplexities()
    none: list[float] = []
    for method in ["none", *options.methods]:
        reset_peak_memory()
        search = permuter(method)
        if options.rounds and hasattr(search, "rounds"):
            search = dataclasses.replace(search, rounds=options.rounds)
        solution = search.solve(prepared.network, prepared.run)
        update_weights(prepared)
        found = perplexities()
        if not none:
            none = found
            yield "dense", [x for value in dense for x in (value, 1.0)] + [0.0, 0.0]
        closed = [gap_closed(*three) or 0.0 for three in zip(found, dense, none, strict=True)]
        figures = [x for pair in zip(found, closed, strict=True) for x in pair]
        yield method, [*figures, solution.seconds, peak_memory_mb()]


def cells(seeds: list[list[float]]) -> list[str]:
    """Means over the seeds, each as a cell."""
    columns = list(zip(*seeds, strict=True))
    found = []
    for number, column in enumerate(columns):
        mean = statistics.mean(column)
        if number >= len(columns) - 2:
            found.append(f"{mean:.0f} |")
        elif number % 2 == 0:
            found.append(f"{mean:.2f} |")
        else:
            spread = f" ± {100 * statistics.stdev(column):.1f}" if len(column) > 1 else ""
            found.append(f"{100 * mean:.1f}{spread} % |")
    return found


def say(*words: str) -> None:
    if not parallel.rank():
        print(*words, flush=True)


if __name__ == "__main__":
    with parallel.processes():
        main()
