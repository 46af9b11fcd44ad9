"""Ablation studies: of the paper, with the learned permuter, and of the orders before an update of all layers.

python benchmarks/ablations.py smollm2-135m --study loss --mode gather --calibration c4.jsonl --data wiki.test.raw
python benchmarks/ablations.py smollm2-135m --study compensation --mode fold --length 128 --samples 192

Those of the paper are the loss, the number of groups, and the length of the search.

Li et al. 2026, arXiv 2601.22980, "ablations". An epoch is one pass over the calibration windows that gradients are
computed on. Prints a table; --paper studies the published method and parameters.
"""

import argparse
import dataclasses
import math

from permprune.config import PruneConfig
from permprune.engine.measuring import Evaluation
from permprune.jobs.compare import compare
from permprune.losses.objective import Objective
from permprune.permuters.base import Identity, Permuter
from permprune.permuters.cost_matrix import LearnedPaper
from permprune.permuters.kept import RIAPermuter
from permprune.permuters.learned import Learned
from permprune.permuters.reconstruction import Reconstruction
from permprune.permuters.trust_region import Newton
from permprune.report.comparison import comparison_table
from permprune.system.progress import console

OBJECTIVES = {
    "CE": Objective(),
    "distillation": Objective(0.0, distillation=1e-5),
    "CE + distillation": Objective(distillation=1e-5),
    "KL": Objective(0.0, divergence=1.0),
    "KL + distillation": Objective(0.0, divergence=1.0, distillation=1e-5),
}
ORDERS: dict[str, Permuter] = {
    "natural order": Identity(),
    "ria": RIAPermuter(),
    "reconstruction": Reconstruction(swaps=3, candidates=1),
    "three rounds of newton": Newton(rounds=3),
}
GROUPS = (1, 2, 4, 8, 16)
EPOCHS = (0.0, 0.25, 0.5, 1.0, 2.0)


def lasting(learner: Learned | LearnedPaper, epochs: float, windows: int) -> Learned | LearnedPaper:
    """The learner with `epochs` passes over `windows` windows."""
    count = math.ceil(epochs * windows / learner.examples)
    return dataclasses.replace(learner, **{"rounds" if isinstance(learner, Learned) else "steps": count})


def variants(study: str, learner: Learned | LearnedPaper, windows: int) -> dict[str, Permuter]:
    """The permuters of a study, by label."""
    if study == "loss":
        return {label: dataclasses.replace(learner, objective=loss) for label, loss in OBJECTIVES.items()}
    if study == "update":
        return ORDERS
    if study == "groups":
        return {f"{count} groups": dataclasses.replace(learner, groups=count) for count in GROUPS}
    return {f"{length:g} epochs": lasting(learner, length, windows) for length in EPOCHS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--study", choices=("loss", "groups", "epochs", "update"), default="loss")
    parser.add_argument("--paper", action="store_true", help="the published method and parameters")
    parser.add_argument("--epochs", type=float, help="length of each variant of the studies loss and groups")
    parser.add_argument("--mode", choices=("fold", "gather"), default="gather")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--calibration")
    parser.add_argument("--data")
    parser.add_argument("--windows", type=int, default=12)
    options = parser.parse_args()
    config = PruneConfig(mode=options.mode, samples=options.samples, length=options.length)
    config = config if options.calibration is None else config.replace(calibration=options.calibration)
    config = config.replace(update="admm") if options.study == "update" else config
    windows = config.shares(options.samples)[-1]
    learner = LearnedPaper() if options.paper else Learned()
    learner = learner if options.epochs is None else lasting(learner, options.epochs, windows)
    config, evaluation = Evaluation(options.data, options.windows).beside(config)
    result = compare(options.model, variants(options.study, learner, windows), config, evaluation=evaluation)
    console.print(comparison_table(result.to_json()))


if __name__ == "__main__":
    main()
