"""Searches at scale: the forecast of `permprune plan` beside what a run takes, as a Markdown table.

Each model is pruned with each of --methods after one calibration, as by `permprune compare`, in a process of its own.
Printed as they come: the forecast, the losses, times and peak memory of each round, and the perplexity with each method
on each --text, with activations as in the search. The row of a model has the peak memory of the last method and of all
before it, that peak over the forecast and over the bytes of the checkpoint, and the mean time of a round.

python benchmarks/scale.py smollm2-135m --methods newton:rounds=2
"""

import argparse
import dataclasses
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import cast

import torch
from rows import Row, add

from permprune.config import PruneConfig
from permprune.engine.held import Held
from permprune.engine.measuring import Evaluation, Meter
from permprune.engine.session import Session
from permprune.evaluation.result import Result, gap_closed
from permprune.forecasts.fitting import forecast
from permprune.permuters.base import Permuter, Round
from permprune.permuters.registry import permuter
from permprune.permuters.trust_region import TrustRegion
from permprune.system.device import best_device, fast_dtype
from permprune.system.files import gib
from permprune.system.memory import keep_freed_memory, peak_memory_mb, reset_peak_memory

HEAD = "| model | forecast | peak | peak / forecast | peak / checkpoint | seconds a round |\n|---|---|---|---|---|---|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--methods", nargs="+", default=["newton"])
    parser.add_argument("--start", help="the permuter that end-to-end searches start from, by default their own")
    parser.add_argument("--text", nargs="+", default=[None], help="for the perplexity, by default that of `evaluate`")
    parser.add_argument("--windows", type=int, default=8, help="windows of each text")
    for name in ("length", "samples", "measured", "held_out", "batch"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(PruneConfig, name))
    parser.add_argument("--minutes", type=float, help="time limit of each search")
    parser.add_argument("--calibration")
    parser.add_argument("--mode", default=PruneConfig.mode)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    options = vars(parser.parse_args())
    models, methods, path = (options.pop(name) for name in ("models", "methods", "rows"))
    start, texts, windows = (options.pop(name) for name in ("start", "text", "windows"))
    config = PruneConfig(**options)
    evaluations = [Evaluation(text, windows, config.length) for text in texts]
    found = [started(permuter(method), start) for method in methods]
    spawn = multiprocessing.get_context("spawn")
    activations = "bf16" if fast_dtype(best_device()) == torch.bfloat16 else "fp32"
    rows = []
    for model in models:
        with ProcessPoolExecutor(1, spawn) as process:
            rows.append(process.submit(run, model, found, config, evaluations).result())
        settings = f"--batch {config.batch}" + " --recompute" * config.recompute
        cell = {"table": "forecast", "model": model, "length": config.length, "settings": settings}
        add(path, cell | {"activations": activations}, rows[-1])
    print(HEAD, *map(markdown, rows), sep="\n")


def started(method: Permuter, start: str | None) -> Permuter:
    """The method, starting from another permuter if it is an end-to-end search."""
    return dataclasses.replace(method, start=permuter(start)) if start and isinstance(method, TrustRegion) else method


def run(model: str, methods: list[Permuter], config: PruneConfig, evaluations: list[Evaluation]) -> Row:
    """Prune a model with each method and print what is measured; returns its row of figures."""
    keep_freed_memory()  # as the command line does
    told = forecast(model, config.replace(order=methods[-1]), windows=evaluations[0].windows)
    say(f"{model}: forecast {gib(told.host)}, at the peak in stage {told.peak().name}")
    say(f"{model}: {told.seconds}")
    began, rounds = time.monotonic(), list[Round]()
    with Session(partial(Held.open, model, config), evaluations[0]) as session:
        weights = cast(Held, session.weights)
        peaks = [report(f"calibrated in {weights.seconds:.0f} s")]
        network = weights.network

        def follow(round: Round) -> None:
            rounds.append(round)
            peaks.append(report(f"round {round.number}: loss {round.loss:.4f}, {round.seconds:.0f} s"))

        with network.dense_weights(), network.autocast():
            meters = [Meter(weights.model, weights.processor, evaluation) for evaluation in evaluations]
            dense = measured("dense", meters, peaks)
        none: list[Result] = []
        for method in methods:
            reset_peak_memory()
            method.solve(network, dataclasses.replace(weights.plan.run, callbacks=(follow,)))
            with network.autocast():
                results = measured(method.name, meters, peaks)
            none = results if method.name == "none" else none
            for result, one, other in zip(results, dense, none, strict=False):
                closed = gap_closed(result.value, one.value, other.value, metric=result.metric)
                if closed is not None:
                    say(f"{method.name}: {closed:.1%} of the gap closed")
    say(f"{model}: {time.monotonic() - began:.0f} s in all")
    seconds = (rounds[-1].seconds - rounds[0].seconds) / rounds[-1].number if len(rounds) > 1 else None
    figures = {"forecast": told.host, "peak": max(peaks), "checkpoint": told.disk["checkpoint"]}
    return {"model": model, **figures, "seconds_a_round": seconds}


def measured(method: str, meters: list[Meter], peaks: list[float]) -> list[Result]:
    """Measure the network on each text, print the results, and note the peak memory."""
    results = [meter()[0] for meter in meters]
    values = ", ".join(shown(result) for result in results)
    peaks.append(report(f"{method}: {results[0].metric} {values}"))
    return results


def shown(result: Result) -> str:
    """The value with its standard error; a single window has none."""
    error = "" if result.stderr is None else f" (standard error {result.stderr:.4f})"
    return f"{result.value:.4f}{error}"


def report(what: str) -> float:
    """Print a line with the peak memory since the calibration or the method began; returns the peak in bytes."""
    peak = (peak_memory_mb() or 0.0) * 2**20
    say(f"{time.strftime('%H:%M:%S')} {what}; peak {gib(peak)}")
    return peak


def markdown(row: Row) -> str:
    seconds = "" if row["seconds_a_round"] is None else f"{row['seconds_a_round']:.0f}"
    ratios = f"{row['peak'] / row['forecast']:.2f} | {row['peak'] / row['checkpoint']:.2f}"
    return f"| {row['model']} | {gib(row['forecast'])} | {gib(row['peak'])} | {ratios} | {seconds} |"


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
