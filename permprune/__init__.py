"""permprune learns channel permutations so that N:M pruning of a Transformer loses less."""

from permprune.commands import compare, evaluate, prune_to_folder, verify_folder
from permprune.coupling import discover, fold, fold_all
from permprune.errors import PermpruneError
from permprune.evaluate import Result, TaskList, evaluate_model, evaluate_tasks, fit_probe, perplexity
from permprune.examples import Examples
from permprune.finetuning import FineTuning, finetune
from permprune.model_io import load, read_model
from permprune.pattern import Pattern
from permprune.permuters import (
    Identity,
    Learned,
    Newton,
    Permuter,
    Random,
    Reconstruction,
    RIAPermuter,
)
from permprune.pipeline import Pruned, Settings, prune
from permprune.saliency import OBS, RIA, Magnitude, Saliency, Wanda
from permprune.sweep import sweep
from permprune.trials import Evaluation
from permprune.updates import SparseGPT, Update

__all__ = [
    "OBS",
    "RIA",
    "Evaluation",
    "Examples",
    "FineTuning",
    "Identity",
    "Learned",
    "Magnitude",
    "Newton",
    "Pattern",
    "PermpruneError",
    "Permuter",
    "Pruned",
    "RIAPermuter",
    "Random",
    "Reconstruction",
    "Result",
    "Saliency",
    "Settings",
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
    "perplexity",
    "prune",
    "prune_to_folder",
    "read_model",
    "sweep",
    "verify_folder",
]
