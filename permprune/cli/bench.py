"""`permprune bench`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from permprune.cli import common as cli
from permprune.cli.settings import numbers_in
from permprune.options import Count


@cli.command
def bench(
    folders: Annotated[list[Path], typer.Argument(help="folders of pruned or packed checkpoints")],
    dense: Annotated[
        str | None, typer.Option(help="the dense model", show_default="the one in the first folder's record")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            help="batch sizes, separated by commas", show_default="1,8,32, and 128 of a model that generates nothing"
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            help="lengths of prompts or texts in tokens, separated by commas",
            show_default="128,2048; 128 of a model that generates nothing",
        ),
    ] = None,
    steps: Annotated[Count, typer.Option(help="tokens to generate in each measurement")] = 16,
    turns: Annotated[Count, typer.Option(help="times to repeat each measurement; the shortest time counts")] = 3,
    threads: Annotated[
        Count | None,
        typer.Option(help="CPU threads of each model", show_default="as many as PyTorch uses", metavar="<int>"),
    ] = None,
    kv: Annotated[
        Path | None, typer.Option(help="folder that permprune kv wrote: measures models with that pruned cache too")
    ] = None,
    trust_remote_code: cli.TrustRemoteCode = False,
    json: cli.Json = None,
) -> Iterator[None]:
    """Measure the speed, size and memory of FOLDERS beside the dense model, and add them to their records."""

    batches = None if batch is None else numbers_in("batch", batch, int)
    contexts = None if context is None else numbers_in("context", context, int)
    yield

    from permprune.jobs.bench import bench as run
    from permprune.jobs.bench import report
    from permprune.report.speed import bench_table, summary

    benchmark = run(
        folders,
        dense=dense,
        batches=batches,
        contexts=contexts,
        steps=steps,
        turns=turns,
        threads=threads,
        kv=kv,
        trust_remote_code=trust_remote_code,
    )
    figures = benchmark.to_json()
    cli.show(bench_table(figures))
    for row in figures["rows"]:
        if not row["dense"]:
            print(f"{row['name']}: {summary(figures, row)}")
    cli.write_figures(json, figures)
    for folder in folders:
        report(benchmark, folder)
