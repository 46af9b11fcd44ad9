"""`permprune compare`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from permprune.cli import common as cli
from permprune.cli.settings import numbers_in, parts
from permprune.config import MIX_FIELDS, PruneConfig
from permprune.engine.measuring import Evaluation
from permprune.errors import PermpruneError
from permprune.jobs.cells import plan_cells

if TYPE_CHECKING:
    from permprune.jobs.cells import Comparison


@partial(
    cli.command,
    without=(*MIX_FIELDS, "effort", "order", "pattern", "minutes", "offload", "shard", "examples"),
)
def compare(
    model: cli.Model,
    config: PruneConfig,
    evaluation: Evaluation,
    methods: Annotated[
        str, typer.Option(help="searches, separated by commas, with options as in newton:rounds=6")
    ] = "none,ria,newton",
    patterns: Annotated[
        str, typer.Option(help="N:M patterns, separated by commas; mixed@0.6: one for each layer, keeping this share")
    ] = "2:4",
    budgets: Annotated[
        str,
        typer.Option(help="time limits of a search in minutes, separated by commas", show_default="no limit"),
    ] = "",
    out: Annotated[Path | None, typer.Option(help="folder for report, picture and results; must not exist yet")] = None,
    resume: cli.Resume = False,
    json: cli.Json = None,
) -> Iterator[None]:
    """Measure methods x patterns x budgets on MODEL: quality, size, seconds and peak memory, as a table and a page."""

    from permprune.permuters.registry import permuters

    names, asked = parts(methods), (parts(patterns), numbers_in("budgets", budgets, float))
    if not names or not asked[0]:
        raise PermpruneError(f"--{'patterns' if names else 'methods'} names none: give at least one")
    config, evaluation = evaluation.beside(config)
    plan_cells(asked[0], permuters(names), asked[1])
    yield

    from permprune.jobs.compare import compare as run
    from permprune.report.comparison import comparison_decision, comparison_table

    def announce(result: Comparison) -> None:
        figures = result.to_json()
        cli.show(comparison_table(figures))
        print(comparison_decision(figures))
        cli.write_figures(json, figures)

    run(
        model,
        names,
        config,
        patterns=asked[0],
        budgets=asked[1],
        evaluation=evaluation,
        out=out,
        resume=resume,
        announce=announce,
    )
    if out is not None:
        print(f"written to {out} (report.html, figures.json)")
