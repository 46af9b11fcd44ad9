"""`permprune sweep`."""

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

if TYPE_CHECKING:
    from permprune.jobs.sweep_cells import Sweep


@partial(
    cli.command,
    without=(*MIX_FIELDS, "effort", "permute", "pattern", "minutes", "offload", "shard", "examples"),
)
def sweep(
    model: cli.Model,
    out: Annotated[Path, typer.Option(help="folder for the report, picture and results; must not exist yet")],
    config: PruneConfig,
    evaluation: Evaluation,
    patterns: Annotated[
        str, typer.Option(help="N:M patterns, separated by commas; mixed@0.6: one for each layer, keeping this share")
    ] = "1:4,2:4,4:8,2:8,8:16,mixed",
    methods: cli.Methods = "none,ria,newton",
    budgets: Annotated[
        str,
        typer.Option(help="time limits of a search in minutes, separated by commas", show_default="no limit"),
    ] = "",
    resume: cli.Resume = False,
) -> Iterator[None]:
    """Measure patterns x methods x budgets on MODEL: quality against size, as a table, a page and a picture."""

    from permprune.jobs.sweep_cells import plan_cells

    config, evaluation = evaluation.beside(config)
    cells = parts(patterns), parts(methods), numbers_in("budgets", budgets, float)
    plan_cells(*cells)
    yield

    from permprune.jobs.sweep import sweep as run

    run(
        model,
        out,
        config,
        patterns=cells[0],
        methods=cells[1],
        budgets=cells[2],
        evaluation=evaluation,
        resume=resume,
        announce=announce,
    )
    print(f"written to {out} (report.html, figures.json, pareto.png)")


def announce(result: Sweep) -> None:
    """Print the table and the summary of a sweep."""
    from permprune.report.sweep import sweep_decision, sweep_table

    figures = result.to_json()
    cli.show(sweep_table(figures))
    print(sweep_decision(figures))
