"""The job of `permprune probe`: fit a linear classifier to the features of a model and write both to a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from permprune.checkpoints.origin import origin_of
from permprune.checkpoints.source import ModelSource, open_model
from permprune.data.load import load_examples
from permprune.evaluation.linear_probe import fit_probe, with_head
from permprune.evaluation.result import Result
from permprune.evaluation.size import weight_bytes
from permprune.models.layers import require_changeable
from permprune.models.modality import ANSWERED_ONCE
from permprune.models.processors import Processor
from permprune.options import Count, require
from permprune.pruning.folder import require_probe, write_model
from permprune.system.failures import failures_reported
from permprune.system.files import atomic_folder, require_new, require_space
from permprune.system.progress import READ, TRAIN, WRITE, stage, stages


@failures_reported()
@stages(READ, TRAIN, WRITE)
def probe(
    model: ModelSource,
    out: str | Path,
    classes: Sequence[str],
    *,
    source: str | None = None,
    windows: int = 128,
    processor: Processor | None = None,
    trust_remote_code: bool = False,
) -> Result:
    """Fit a linear classifier to a model's features of images or sentences, and write the model with it to `out`.

    `model` is a name, a folder, or a model in memory with its `processor`. `classes` are the names of the classes. A
    pruned model keeps its record and its gathers. `source` and `windows` select the training data as in `Evaluation`;
    `trust_remote_code` is as in `read_model`. Returns the accuracy on a held-out part of the training data. Raises
    `PermpruneError`.
    """
    out = Path(out)
    require("windows", windows, Count)
    require_new(out)
    opened = open_model(model, processor, trust_remote_code=trust_remote_code)
    require_changeable(opened.model)
    require_space(out, weight_bytes(opened.model))
    headed = with_head(opened.model, classes)
    if (origin := origin_of(headed)).record:
        require_probe(origin)
    stage(TRAIN)
    count = windows * ANSWERED_ONCE
    examples = load_examples(source, headed, opened.processor, part="calibration", count=count)
    fitted = fit_probe(headed, examples, classes=len(classes))
    # The record's measurements are those of the model with another head.
    unmeasured = {"measured": None, "gap_closed": None, "optimised": None, "bench": None, "showcase": None}
    stage(WRITE)
    with atomic_folder(out) as folder:
        write_model(fitted.model, opened.processor, folder, **unmeasured)
    return fitted.result
