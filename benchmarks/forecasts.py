"""Forecasts of `prune` beside the processor time of its stages, on one thread: a Markdown table.

OMP_NUM_THREADS=1 python benchmarks/forecasts.py
OMP_NUM_THREADS=1 python benchmarks/forecasts.py --models smollm2-135m --effort minutes

Without --effort a run is small: one round and a few steps on few windows, whose stages scale with the numbers in the
forecast as those of a preset do. Speech needs a folder of clips (--speech).
"""

import argparse
import functools
import pkgutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from zoo import folder_of

from permprune.config import PruneConfig
from permprune.engine.measuring import Evaluation
from permprune.forecasts.forecast import Forecast
from permprune.jobs.prune import prune_to_folder

STAGES = {
    "transcribe": ["permprune.engine.held:transcribed"],
    "calibrate": ["permprune.engine.held:calibrate"],
    "ria": ["permprune.permuters.kept:RIAPermuter.each"],
    "reconstruction": ["permprune.permuters.reconstruction:Reconstruction.each"],
    "reconstruction: accept": ["permprune.permuters.reconstruction:Reconstruction._choose"],
    "newton: gradients": ["permprune.permuters.iterate:Landscape.gradients"],
    "newton: proposals": ["permprune.permuters.trust_region:TrustRegion.proposals"],
    "newton: accept": ["permprune.permuters.iterate:Landscape.held_out_loss"],
    "update": ["permprune.updates.base:LayerUpdate.run"],
    "training": ["permprune.recipe:train_weights"],
    "evaluate": ["permprune.engine.measuring:Meter.__call__"],
}
"""The functions whose time is that of a stage, without that of other stages inside; the first outermost one counts."""

MODELS = ("smollm2-135m", "minilm-l6", "vit-s14", "whisper-tiny-en")


class Watch:
    """The processor time of each stage."""

    def __init__(self) -> None:
        self.spent, self._inside, self._since = Counter[str](), ["other"], time.process_time()

    def _enter(self, *stages: str) -> None:
        now = time.process_time()
        self.spent[self._inside[-1]] += now - self._since  # type: ignore[assignment]
        self._inside[len(self._inside) - (not stages) :] = stages
        self._since = now

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts for the stage."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._enter("reconstruction: accept" if self._inside[-1] == "reconstruction: accept" else stage)
            try:
                return function(*args, **kwargs)
            finally:
                self._enter()

        return run

    def watch(self) -> None:
        """Replace the functions of all stages."""
        for stage, places in STAGES.items():
            for place in places:
                owner, _, name = place.replace(":", ".").rpartition(".")
                found = pkgutil.resolve_name(owner)
                setattr(found, name, self.timed(stage, getattr(found, name)))


class Measured(Exception):
    """Ends a run before its folder is written."""


def stop(_: object) -> None:
    raise Measured


def measure(name: str, options: argparse.Namespace, watch: Watch) -> list[str]:
    """Prune a model, and return the rows of its stages."""
    config = PruneConfig(effort=options.effort) if options.effort else SMALL
    source = str(options.speech) if name.startswith("whisper") else None
    config, evaluation = Evaluation(source, 24 if options.effort else 1).beside(config.replace(calibration=source))
    forecasts: list[Forecast] = []
    watch.spent.clear()
    with tempfile.TemporaryDirectory() as folder, suppress(Measured):
        out = Path(folder) / "out"
        prune_to_folder(folder_of(name), out, config, evaluation=evaluation, begin=forecasts.append, announce=stop)
    expected = {stage: seconds for stage, seconds in forecasts[0].seconds.items() if seconds and stage in STAGES}
    rows = [(stage, seconds, watch.spent[stage]) for stage, seconds in expected.items()]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    rows.append(("other", float("nan"), watch.spent["other"]))
    return [f"| {name} | {stage} | {one:.1f} | {two:.1f} | {two / one:.2f} |" for stage, one, two in rows]


SMALL = PruneConfig(
    order="newton:rounds=1:examples=2", update="admm", train="steps=4", samples=12, measured=2, held_out=2
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="models, separated by commas")
    parser.add_argument("--effort", help="measure this preset in place of a small run")
    parser.add_argument("--speech", type=Path, help="folder of clips; without it no Whisper is measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | stage | forecast, s | processor, s | ratio |\n|---|---|---|---|---|", flush=True)
    watch = Watch()
    watch.watch()
    for name in options.models.split(","):
        if options.speech or not name.startswith("whisper"):
            print("\n".join(measure(name, options, watch)), flush=True)


if __name__ == "__main__":
    main()
