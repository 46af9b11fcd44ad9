"""`permprune pack` and `permprune unpack`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from permprune.cli import common as cli
from permprune.config import PruneConfig
from permprune.options import HEADS, PACKED, require_choice


@cli.command
def pack(
    folder: cli.Folder,
    out: Annotated[Path, typer.Option(help="folder for the packed checkpoint; must not exist yet")],
    dtype: Annotated[str, typer.Option(help="data type of the kept weights: fp32, bf16, fp16, int8 or int4")] = "bf16",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="data to solve int4 values on, as for permprune prune: text, sentences, images or speech",
            show_default="values are rounded",
        ),
    ] = None,
    head: cli.Head = None,
    trust_remote_code: cli.TrustRemoteCode = False,
) -> Iterator[None]:
    """Write a pruned FOLDER with packed weights: about half the size. Transformers loads it with permprune imported."""

    require_choice("dtype", dtype, PACKED)
    if head is not None:
        require_choice("head", head, HEADS)
    config = None
    if calibration is not None:
        require_choice("dtype with --calibration", dtype, ["int4"])
        config = PruneConfig(calibration=calibration, trust_remote_code=trust_remote_code)
    yield

    from permprune.jobs.packing import pack_folder

    packed = pack_folder(
        folder,
        out,
        dtype=dtype,
        head=head,
        calibration=config,
        trust_remote_code=trust_remote_code,
    )
    layers, weights = (
        f"{sizes.packed / 1e6:.1f} MB, dense {sizes.dense / 1e6:.1f} MB" for sizes in (packed.layers, packed.weights)
    )
    print(f"pruned layers: {layers}; all weights: {weights}")
    if packed.left_dense:
        print(f"left dense, as they have no packed form: {', '.join(packed.left_dense)}")
    print(
        f"outputs on random inputs (up to {packed.largest:.2g}) differ by at most {packed.difference:.2g} from those "
        f"of the masked model, {packed.before:.2g} before packing; random rounding makes it {packed.rounding:.2g}"
    )
    print(f"written to {out}")


@cli.command
def unpack(
    folder: Annotated[Path, typer.Argument(help="a folder with packed weights")],
    out: Annotated[Path, typer.Option(help="folder for the checkpoint with zeros; must not exist yet")],
    trust_remote_code: cli.TrustRemoteCode = False,
) -> Iterator[None]:
    """Write a packed FOLDER as an ordinary checkpoint, with zeros for the pruned weights."""

    yield

    from permprune.jobs.packing import unpack_folder

    unpack_folder(folder, out, trust_remote_code=trust_remote_code)
    print(f"written to {out}")
