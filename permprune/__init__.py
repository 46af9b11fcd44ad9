"""permprune learns channel permutations so that N:M pruning of a Transformer loses less."""

from permprune.commands import compare, evaluate, prune_to_folder, verify_folder
from permprune.coupling import discover, fold, fold_all
from permprune.errors import PermpruneError
from permprune.evaluate import Result, TaskList, evaluate_model, evaluate_tasks, fit_probe, perplexity
from permprune.examples import Examples
from permprune.finetuning import FineTuning, finetune
from permprune.inference.pack import pack, unpack
from permprune.jobs.packing import pack_folder, unpack_folder
from permprune.losses import Objective
from permprune.model_io import load, read_model
from permprune.network import PrunedNetwork
from permprune.pattern import Pattern
from permprune.permuters import (
    Identity,
    Learned,
    LocalPermuter,
    Newton,
    Permuter,
    Random,
    Reconstruction,
    RIAPermuter,
    Run,
    Solution,
)
from permprune.pipeline import Pruned, Settings, prune
from permprune.problem import Problem
from permprune.pruning.folder import save
from permprune.saliency import OBS, RIA, Magnitude, Saliency, Wanda
from permprune.sweep import sweep
from permprune.trials import Evaluation
from permprune.updates import LayerUpdate, SparseGPT, Update

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
