"""`permprune kv`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from permprune.cli import common as cli
from permprune.cli.settings import option, parse_loss
from permprune.config import PruneConfig
from permprune.engine.measuring import Evaluation
from permprune.kv.config import KVConfig
from permprune.options import Count, Seed


@partial(cli.command, without=("keys", "values", "metric", "examples"))
def kv(
    model: cli.Model,
    out: Annotated[Path, typer.Option(help="folder for the cache's orders and record; must not exist yet")],
    config: KVConfig,
    evaluation: Evaluation,
    pattern: Annotated[
        str,
        typer.Option(
            help="N:M keeps N of every M channels of a head, in keys and values; 4bit (or 2 to 6) keeps all channels "
            "in so many bits; auto gives each head bits of its own, as --bytes 0.28",
            metavar="N:M",
        ),
    ] = "auto",
    budget: Annotated[
        float | None,
        typer.Option(
            "--bytes",
            help="bytes of a packed token relative to 16-bit states, such as 0.25: each head gets bits of its own, in "
            "keys and in values, chosen by the error of the output of attention",
        ),
    ] = None,
    max_loss: Annotated[
        str | None,
        typer.Option(
            help="the fewest --bytes with which perplexity on held-out calibration text grows by at most a share: 0.5%",
            metavar="SHARE",
        ),
    ] = None,
    keys: Annotated[str | None, option(KVConfig, "keys", show_default="that of --pattern")] = None,
    values: Annotated[str | None, option(KVConfig, "values", show_default="that of --pattern")] = None,
    permute: Annotated[
        str,
        typer.Option(
            help="search for the channel orders, where a head has several groups: none, random, ria or cp, with "
            "options after the name, such as cp:escapes=50"
        ),
    ] = "ria",
    calibration: Annotated[
        str | None, typer.Option(help="the text to calibrate on: a file, or a data set id; by default the zoo's")
    ] = None,
    samples: Annotated[Count, typer.Option(help="windows of text to calibrate on")] = 16,
    fold: Annotated[
        Path | None,
        typer.Option(
            help="folder for a copy of the model whose weights give the values in the stored order, so that the cache, "
            "which is then for that copy, need not reorder them; must not exist yet"
        ),
    ] = None,
    seed: Annotated[Seed, option(PruneConfig, "seed")] = PruneConfig.seed,
    trust_remote_code: cli.TrustRemoteCode = False,
    json: cli.Json = None,
) -> Iterator[None]:
    """Find the channel orders of a pruned key/value cache for MODEL, and measure it."""

    from permprune.permuters.registry import score_permuter

    config = config.replace(keys=keys or pattern, values=values or pattern)
    most = None if max_loss is None else parse_loss(max_loss)
    score_permuter(permute)
    yield

    from permprune.checkpoints.schema import encode
    from permprune.jobs.kv import calibrate_kv
    from permprune.report.words import number

    record = calibrate_kv(
        model,
        out,
        config,
        permute=permute,
        calibration=calibration,
        samples=samples,
        length=evaluation.length,
        seed=seed,
        fold=fold,
        evaluation=evaluation,
        budget=budget,
        max_loss=most,
        trust_remote_code=trust_remote_code,
    )
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
    print(f"written to {out}" + ("" if fold is None else f", the model that it is for to {fold}"))
    cli.write_figures(json, encode(record))
