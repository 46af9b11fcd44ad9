"""`permprune compare`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from permprune.cli import common as cli
from permprune.cli.settings import parts
from permprune.config import PruneConfig
from permprune.engine.measuring import Evaluation
from permprune.errors import PermpruneError


@partial(cli.command, without=("effort", "permute", "max_loss", "offload", "shard"))
def compare(
    model: cli.Model,
    config: PruneConfig,
    evaluation: Evaluation,
    methods: cli.Methods = ("none,ria,reconstruction,newton,learned"),
    out: Annotated[
        Path | None, typer.Option(help="folder for the checkpoint of the best method; must not exist yet")
    ] = None,
    json: cli.Json = None,
) -> Iterator[None]:
    """Compare permuters on one MODEL: perplexity, share of the gap closed, seconds and peak memory."""

    from permprune.permuters.registry import permuters

    names = [name for name in parts(methods) if name != "dense"]
    config, evaluation = evaluation.beside(config)
    if not parts(methods):
        raise PermpruneError("--methods names no search: give at least one")
    permuters(names)
    yield

    from permprune.jobs.compare import Comparison
    from permprune.jobs.compare import compare as run
    from permprune.report.showcase import comparison_table, examples_shown, titles

    def announce(result: Comparison) -> None:
        figures = result.to_json()
        cli.show(comparison_table(figures))
        cli.write_figures(json, figures)
        if out is None:
            cli.show("", examples_shown(figures["showcase"], titles(config.pattern, result.best.method)))

    run(model, names, config, evaluation=evaluation, out=out, announce=announce)
    if out is not None:
        cli.show_written(out)
