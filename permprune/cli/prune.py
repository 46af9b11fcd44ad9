"""`permprune prune`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from permprune.cli import common as cli
from permprune.cli.plan import intention
from permprune.config import PruneConfig
from permprune.engine.measuring import Evaluation, require_data

if TYPE_CHECKING:
    from permprune.checkpoints.record import Record
    from permprune.forecasts.forecast import Forecast


@cli.command
def prune(
    model: cli.Model,
    out: Annotated[Path, typer.Option(help="folder for the pruned checkpoint; must not exist yet")],
    config: PruneConfig,
    evaluation: Evaluation,
    pack: cli.Pack = None,
    head: cli.Head = None,
    resume: cli.Resume = False,
) -> Iterator[None]:
    """Prune MODEL to N:M with a searched channel order, and write a checkpoint, its record and a report."""

    config.require_one_choice()
    require_data(config, evaluation)
    config, evaluation = evaluation.beside(config)
    config.packed_as(pack, head)  # raises
    yield

    from permprune.jobs.prune import prune_to_folder

    prune_to_folder(
        model,
        out,
        config,
        evaluation=evaluation,
        pack=pack,
        head=head,
        resume=resume,
        begin=_begin,
        announce=_announce,
    )
    cli.show_written(out)


def _begin(forecast: Forecast) -> None:
    figures = forecast.to_json()
    print("\n".join([*figures["recipe"], intention(figures)]))


def _announce(record: Record) -> None:
    from permprune.report.run import decision
    from permprune.report.words import overlap_note

    print(decision(record.to_json()))
    if record.measured and (note := overlap_note(record.measured.overlap)):
        print(note)
