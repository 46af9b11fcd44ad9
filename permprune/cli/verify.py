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
        f"the checkpoint loads; its outputs differ by at most {verified.difference:.1e} from those of the masked model"
    )
