"""`permprune kv`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from permprune.cli import common as cli
from permprune.config import PruneConfig


@cli.command
def kv(
    model: cli.Model,
    out: Annotated[Path, typer.Option(help="folder for the cache's orders and record; must not exist yet")],
    pattern: Annotated[
        str,
        typer.Option(
            help="N:M keeps N of every M channels of a head, in keys and values; auto is one group for the whole head, "
            "29:64 for heads of 64 channels, 62:128 for 128 (with int5 42:64 and 90:128)",
            metavar="N:M",
        ),
    ] = "auto",
    keys: Annotated[
        str | None,
        typer.Option(help="pattern of the keys, or dense", metavar="N:M", show_default="that of --pattern"),
    ] = None,
    values: Annotated[
        str | None,
        typer.Option(help="pattern of the values, or dense", metavar="N:M", show_default="that of --pattern"),
    ] = None,
    recovery: Annotated[
        str, typer.Option(help="values of pruned channels: zeros, or sign, which stores their signs")
    ] = "sign",
    dtype: Annotated[
        str, typer.Option(help="data type of the kept values: int8, int5, bf16, fp16, fp32, or auto for the model's")
    ] = "int8",
    window: Annotated[int, typer.Option(help="number of newest tokens that are not pruned")] = 32,
    sinks: Annotated[int, typer.Option(help="number of first tokens that are not pruned")] = 4,
    permute: Annotated[
        str,
        typer.Option(
            help="search for the channel orders, where a head has several groups: none, random, ria or cp, with "
            "options after the name, such as cp:escapes=50"
        ),
    ] = "ria",
    calibration: Annotated[
        str | None,
        typer.Option(help="text to calibrate on: a file, or a data set id", show_default="the default data"),
    ] = None,
    samples: Annotated[int, typer.Option(help="windows of text to calibrate on")] = 16,
    fold: Annotated[
        Path | None,
        typer.Option(
            help="folder for a copy of the model whose weights give the values in the stored order, so that the cache, "
            "which is then for that copy, need not reorder them; must not exist yet"
        ),
    ] = None,
    data: cli.Data = None,
    windows: cli.Windows = 24,
    length: cli.Length = PruneConfig.length,
    seed: Annotated[int, typer.Option(help="random seed: the same one gives the same orders")] = PruneConfig.seed,
    trust_remote_code: cli.TrustRemoteCode = False,
    json: cli.Json = None,
) -> Iterator[None]:
    """Find the channel orders of a pruned key/value cache for MODEL, and measure it."""

    from permprune.engine.measuring import Evaluation
    from permprune.kv.config import KVConfig
    from permprune.options import Count, Seed, require
    from permprune.permuters.registry import score_permuter

    config = KVConfig(keys or pattern, values or pattern, recovery=recovery, dtype=dtype, window=window, sinks=sinks)
    evaluation = Evaluation(data, windows, length)
    score_permuter(permute)
    require("samples", samples, Count)
    require("seed", seed, Seed)
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
        length=length,
        seed=seed,
        fold=fold,
        evaluation=evaluation,
        trust_remote_code=trust_remote_code,
    )
    for side, kept in record.kept.items():
        natural = "" if kept.found == kept.natural else f", {kept.natural:.1%} in the model's order"
        print(f"{side} {getattr(record.config, side)}: {kept.found:.1%} of the score kept{natural}")
    measured = record.measured
    assert measured is not None
    print(
        f"perplexity {number(measured.pruned)}, with a dense cache {number(measured.dense)}; "
        f"cache {measured.pruned_bytes / 1e6:.1f} MB, dense {measured.dense_bytes / 1e6:.1f} MB"
    )
    print(f"written to {out}" + ("" if fold is None else f", the model that it is for to {fold}"))
    cli.write_figures(json, encode(record))
