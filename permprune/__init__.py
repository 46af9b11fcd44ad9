"""permprune learns channel permutations so that N:M pruning of a Transformer loses less."""

from __future__ import annotations

from permprune.system.interrupts import leaving_on_interrupt

with leaving_on_interrupt():
    from permprune.checkpoints.io import load, read_model
    from permprune.coupling.discovery import discover
    from permprune.coupling.fold import fold, fold_all
    from permprune.errors import PermpruneError
    from permprune.evaluation.dispatch import evaluate_model
    from permprune.evaluation.lm_tasks import TaskList, evaluate_tasks
    from permprune.evaluation.perplexity import perplexity
    from permprune.evaluation.probe import fit_probe
    from permprune.evaluation.result import Result
    from permprune.examples import Examples
    from permprune.inference.pack import pack, unpack
    from permprune.jobs.compare import compare
    from permprune.jobs.evaluate import evaluate
    from permprune.jobs.finetune import FineTuning, finetune
    from permprune.jobs.packing import pack_folder, unpack_folder
    from permprune.jobs.prune import prune_to_folder
    from permprune.jobs.sweep import sweep
    from permprune.jobs.trials import Evaluation
    from permprune.jobs.verify import verify_folder
    from permprune.losses.objective import Objective
    from permprune.pattern import Pattern
    from permprune.permuters.base import LocalPermuter, Permuter, Run, Solution
    from permprune.permuters.identity import Identity, Random
    from permprune.permuters.learned import Learned
    from permprune.permuters.newton import Newton
    from permprune.permuters.reconstruction import Reconstruction
    from permprune.permuters.ria import RIAPermuter
    from permprune.pipeline import Pruned, prune
    from permprune.pruning.folder import save
    from permprune.pruning.network import PrunedNetwork
    from permprune.pruning.problem import Problem
    from permprune.saliency.base import Saliency
    from permprune.saliency.magnitude import Magnitude
    from permprune.saliency.obs import OBS
    from permprune.saliency.ria import RIA
    from permprune.saliency.wanda import Wanda
    from permprune.settings import Settings
    from permprune.updates.base import LayerUpdate, Update
    from permprune.updates.sparsegpt import SparseGPT

__all__ = [
    "OBS",
    "RIA",
    "Evaluation",
    "Examples",
    "FineTuning",
    "Identity",
    "LayerUpdate",
    "Learned",
    "LocalPermuter",
    "Magnitude",
    "Newton",
    "Objective",
    "Pattern",
    "PermpruneError",
    "Permuter",
    "Problem",
    "Pruned",
    "PrunedNetwork",
    "RIAPermuter",
    "Random",
    "Reconstruction",
    "Result",
    "Run",
    "Saliency",
    "Settings",
    "Solution",
    "SparseGPT",
    "TaskList",
    "Update",
    "Wanda",
    "compare",
    "discover",
    "evaluate",
    "evaluate_model",
    "evaluate_tasks",
    "finetune",
    "fit_probe",
    "fold",
    "fold_all",
    "load",
    "pack",
    "pack_folder",
    "perplexity",
    "prune",
    "prune_to_folder",
    "read_model",
    "save",
    "sweep",
    "unpack",
    "unpack_folder",
    "verify_folder",
]
