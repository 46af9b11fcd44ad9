"""`permprune prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from permprune.cli import common as cli
from permprune.commands import Evaluation, prune_to_folder
from permprune.pipeline import Settings


@cli.command
def prune(
    model: cli.Model,
    out: Annotated[Path, typer.Option(help="folder for the pruned checkpoint; must not exist yet")],
    pattern: cli.PatternOption = "2:4",
    saliency: cli.SaliencyOption = "wanda",
    permute: Annotated[str, typer.Option(help="none, random, ria, cp, reconstruction, newton or learned")] = "newton",
    mode: cli.Mode = "fold",
    calibration: cli.Calibration = None,
    data: cli.Data = None,
    windows: cli.Windows = 24,
    samples: cli.Samples = 192,
    length: cli.Length = 512,
    seed: cli.Seed = 0,
    precision: cli.Precision = "auto",
    memory: cli.Memory = None,
    minutes: cli.Minutes = None,
    exclude: cli.Exclude = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from an interrupted run's last state")] = False,
) -> None:
    """Prune MODEL to N:M with a searched channel order, and write a checkpoint, its record and a report."""
    settings = Settings(
        pattern=pattern,
        saliency=saliency,
        mode=mode,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        precision=precision,
        memory=cli.parse_bytes(memory),
        minutes=minutes,
        exclude=tuple(exclude or ()),
    )
    record = prune_to_folder(model, out, permute, settings, Evaluation(data, windows, length), resume)
    values = record["perplexity"]
    closed = record["gap_closed"]
    print(
        f"{pattern} with {permute}: perplexity {values['pruned']:.2f}, dense {values['dense']:.2f}, "
        f"without permutation {values['none']:.2f}" + ("" if closed is None else f": {closed:.0%} of the gap closed")
    )
    print(f"written to {out} (report.html, permprune.json)")
