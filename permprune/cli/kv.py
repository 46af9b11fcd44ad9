"""`permprune kv`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from permprune.cli import common as cli
from permprune.cli.settings import option
from permprune.engine.measuring import Evaluation
from permprune.jobs.kv_search import KVSearch
from permprune.kv.config import KVConfig

if TYPE_CHECKING:
    from permprune.kv.files import KVRecord


@partial(cli.command, without=("keys", "values", "metric", "examples"))
def kv(
    model: cli.Model,
    out: Annotated[Path, typer.Option(help="folder for the cache's orders and record; must not exist yet")],
    config: KVConfig,
    evaluation: Evaluation,
    search: KVSearch,
    pattern: Annotated[
        str,
        typer.Option(
            help="N:M keeps N of every M channels of a head, in keys and values; 4bit (or 2 to 6) keeps all channels "
            "in so many bits; auto gives each head bits of its own, as --bytes 0.28",
            metavar="N:M",
        ),
    ] = "auto",
    keys: Annotated[str | None, option(KVConfig, "keys", show_default="that of --pattern")] = None,
    values: Annotated[str | None, option(KVConfig, "values", show_default="that of --pattern")] = None,
    fold: Annotated[
        Path | None,
        typer.Option(
            help="folder for a copy of the model whose weights give the values in the stored order, so that the cache, "
            "which is then for that copy, need not reorder them; must not exist yet"
        ),
    ] = None,
    trust_remote_code: cli.TrustRemoteCode = False,
    json: cli.Json = None,
) -> Iterator[None]:
    """Find the channel orders of a pruned key/value cache for MODEL, and measure it."""

    config = config.replace(keys=keys or pattern, values=values or pattern)
    yield

    from permprune.checkpoints.schema import encode
    from permprune.jobs.kv import calibrate_kv

    record = calibrate_kv(
        model, out, config, search=search, evaluation=evaluation, fold=fold, trust_remote_code=trust_remote_code
    )
    _announce(record)
    print(f"written to {out}" + ("" if fold is None else f", the model that it is for to {fold}"))
    cli.write_figures(json, encode(record))


def _announce(record: KVRecord) -> None:
    """Print the budget of a cache or what its patterns keep, and its perplexities."""
    from permprune.report.words import number

    if record.budget is not None:
        print(f"keys and values mixed: each head has bits of its own, {record.budget:g} of 16 bits")
    for side, kept in record.kept.items():
        natural = "" if kept.found == kept.natural else f", {kept.natural:.1%} in the model's order"
        print(f"{side} {getattr(record.config, side)}: {kept.found:.1%} of the score kept{natural}")
    for text, measured in (("", record.measured), (" of the calibration text held out", record.chosen)):
        if measured is not None:
            print(
                f"perplexity{text} {number(measured.pruned)}, with a dense cache {number(measured.dense)}; "
                f"cache {measured.pruned_bytes / 1e6:.1f} MB, dense {measured.dense_bytes / 1e6:.1f} MB"
            )
