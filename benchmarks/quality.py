"""What each permuter loses: one Markdown table over modes and methods, on the same masks and data.

python benchmarks/quality.py --calibration wiki.valid.tokens --data wiki.test.tokens --windows 12
"""

import argparse

from permprune import Evaluation, Settings, compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", default="ria,reconstruction,newton,learned")
    parser.add_argument("--modes", default="fold,gather")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--saliency", default="wanda")
    parser.add_argument("--update", default="none")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--calibration")
    parser.add_argument("--data")
    parser.add_argument("--windows", type=int, default=24)
    options = parser.parse_args()
    print("| mode | seed | method | perplexity | gap closed | seconds | peak MiB |\n|---|---|---|---|---|---|---|")
    for mode in options.modes.split(","):
        for seed in options.seeds.split(","):
            settings = Settings(
                pattern=options.pattern,
                saliency=options.saliency,
                mode=mode,
                calibration=options.calibration,
                seed=int(seed),
                update=options.update,
            )
            evaluation = Evaluation(options.data, options.windows)
            for row in compare(options.model, options.methods.split(","), settings, evaluation)["rows"]:
                closed = "" if row["gap_closed"] is None else f"{row['gap_closed']:.0%}"
                figures = f"{row['perplexity']:.2f} | {closed} | {row['seconds']:.0f} | {row['peak_memory_mb']:.0f}"
                print(f"| {mode} | {seed} | {row['method']} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
