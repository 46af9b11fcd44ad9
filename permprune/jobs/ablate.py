"""The paper's ablation studies: the loss, the number of groups, and the length of the search."""

from __future__ import annotations

import dataclasses
import math

from permprune.losses.objective import Objective
from permprune.options import NonNegative, require, require_choice
from permprune.permuters.base import Permuter
from permprune.permuters.learned import Learned
from permprune.permuters.paper import LearnedPaper

PRESETS: dict[str, Learned | LearnedPaper] = {"ours": Learned(), "paper": LearnedPaper()}

OBJECTIVES = {
    "CE": Objective(),
    "distillation": Objective(0.0, distillation=1e-5),
    "CE + distillation": Objective(distillation=1e-5),
    "KL": Objective(0.0, divergence=1.0),
    "KL + distillation": Objective(0.0, divergence=1.0, distillation=1e-5),
}
GROUPS = (1, 2, 4, 8, 16)
EPOCHS = (0.0, 0.25, 0.5, 1.0, 2.0)
STUDIES = ("loss", "groups", "epochs")


def variants(study: str, preset: str, examples: int, *, epochs: float | None = None) -> dict[str, Permuter]:
    """Return the permuters to compare in a study, by label (Li et al. 2026, arXiv 2601.22980, "ablations").

    An epoch is one pass over the calibration examples that gradients are computed on, of which there are `examples`.
    `epochs`, if given, is the length of the search of every variant; the study "epochs" ignores it. Raises
    `PermpruneError` for an unknown study or preset and for `epochs` out of range.
    """
    require_choice("study", study, STUDIES)
    require_choice("preset", preset, PRESETS)
    learner = PRESETS[preset]
    if epochs is not None:
        require("epochs", epochs, NonNegative)
        learner = lasting(learner, epochs, examples)
    if study == "loss":
        return {label: dataclasses.replace(learner, objective=loss) for label, loss in OBJECTIVES.items()}
    if study == "groups":
        return {f"{count} groups": dataclasses.replace(learner, groups=count) for count in GROUPS}
    return {f"{length:g} epochs": lasting(PRESETS[preset], length, examples) for length in EPOCHS}


def lasting(learner: Learned | LearnedPaper, epochs: float, examples: int) -> Learned | LearnedPaper:
    """Return a copy of the learner that makes `epochs` passes over `examples` examples."""
    count = math.ceil(epochs * examples / learner.examples)
    if isinstance(learner, Learned):
        return dataclasses.replace(learner, rounds=count)
    return dataclasses.replace(learner, steps=count)
