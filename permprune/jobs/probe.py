"""Fit a linear classifier to a model, and write both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from permprune.checkpoints.io import read_model
from permprune.checkpoints.origin import origin_of
from permprune.data.load import load_examples
from permprune.evaluation.probe import fit_probe, with_head
from permprune.evaluation.result import Result
from permprune.evaluation.size import weight_bytes
from permprune.jobs.trials import ANSWERED_ONCE
from permprune.models.layers import require_changeable
from permprune.options import Count, require
from permprune.pruning.folder import require_probe, write_model
from permprune.system.files import atomic_folder, require_absent, require_space, require_writable
from permprune.system.out_of_memory import memory_reported


@memory_reported()
def probe(
    name: str,
    out: Path,
    classes: Sequence[str],
    source: str | None,
    windows: int,
    *,
    trust_remote_code: bool = False,
) -> Result:
    """Fit a linear classifier of these classes to what a model makes of images or sentences, and write both to `out`.

    A pruned model keeps its record and its gathers. `source` and `windows` are as those of `Evaluation`, of the part to
    train on; `trust_remote_code` as that of `read_model`. Returns the accuracy on a held-out part of it. Raises
    `PermpruneError`.
    """
    require("windows", windows, Count)
    require_absent(out)
    require_writable(out)
    model, processor, _ = read_model(name, trust_remote_code=trust_remote_code)
    require_changeable(model)
    require_space(out, weight_bytes(model))
    headed = with_head(model, classes)
    if (origin := origin_of(headed)).record:
        require_probe(origin)
    fitted = fit_probe(headed, load_examples(source, headed, processor, "probe", windows * ANSWERED_ONCE))
    unmeasured = {"measured": None, "gap_closed": None, "optimised": None}  # that was with another head
    with atomic_folder(out) as folder:
        write_model(fitted.model, processor, folder, **unmeasured)
    return fitted.result
