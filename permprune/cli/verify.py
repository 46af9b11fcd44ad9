"""`permprune verify`."""

from __future__ import annotations

from collections.abc import Iterator

from permprune.cli import common as cli


@cli.command
def verify(
    folder: cli.Folder,
    trust_remote_code: cli.TrustRemoteCode = False,
) -> Iterator[None]:
    """Check a pruned FOLDER: it is N:M in stored order, it loads, and its outputs are those of the masked model."""

    yield

    from permprune.jobs.verify import verify as run

    verified = run(folder, trust_remote_code=trust_remote_code)
    print(f"{verified.layers} layers hold the pattern in stored order")
    if dense := str(verified.dense):
        print(dense)
    print(
        f"the checkpoint loads; on random inputs its outputs (up to {verified.largest:.2g}) differ by at most "
        f"{verified.difference:.1e} from those of the masked model in fp32"
    )
    if verified.rounding is None:
        print(f"rounding, also that of types in which it was stored before, explains up to {verified.limit:.1e}")
    else:
        print(
            f"that is expected of weights stored as {verified.stored}: random rounding changes the outputs by "
            f"{verified.rounding:.1e}, and more than {verified.limit:.1e} would be refused"
        )
