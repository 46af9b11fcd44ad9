"""permprune learns channel permutations so that N:M pruning of a Transformer loses less.

The names below are imported when they are first used, so that the command line's help takes no torch. Importing the
package makes Transformers know packed checkpoints, now or when it is imported itself.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from permprune.system.imports import after_import

if TYPE_CHECKING:
    from permprune.checkpoints.benchmark import BenchedModel, Benchmark, Speed
    from permprune.checkpoints.io import load, read_model
    from permprune.checkpoints.record import PrunedLayer, Record
    from permprune.config import PruneConfig
    from permprune.coupling.discovery import discover
    from permprune.coupling.fold import fold, fold_all
    from permprune.coupling.verify import verify_space
    from permprune.coupling.walk import Walk, coupling_rule
    from permprune.engine.held import prune
    from permprune.engine.measuring import Evaluation
    from permprune.engine.pruned import Pruned
    from permprune.errors import PermpruneError
    from permprune.evaluation.dispatch import evaluate_model
    from permprune.evaluation.lm_tasks import TaskList, evaluate_tasks
    from permprune.evaluation.perplexity import perplexity
    from permprune.evaluation.probe import fit_probe
    from permprune.evaluation.result import Metric, Result
    from permprune.evaluation.speed import measure_speed
    from permprune.examples import Examples
    from permprune.forecasts.fitting import forecast
    from permprune.forecasts.run import Forecast
    from permprune.inference.kv.cache import PrunedCache
    from permprune.inference.kv.config import KVConfig
    from permprune.inference.kv.evaluation import CachedPerplexity
    from permprune.inference.kv.files import KVRecord
    from permprune.inference.pack import pack, unpack
    from permprune.jobs.bench import bench
    from permprune.jobs.compare import Comparison, ComparisonRow, compare
    from permprune.jobs.evaluate import evaluate
    from permprune.jobs.finetune import FineTuned, FineTuning, finetune
    from permprune.jobs.inspect import InspectedSpace, inspect
    from permprune.jobs.kv import calibrate_kv, evaluate_kv
    from permprune.jobs.packing import Packed, pack_folder, unpack_folder
    from permprune.jobs.prune import prune_to_folder
    from permprune.jobs.sweep import sweep
    from permprune.jobs.swept import Sweep, SweepRow
    from permprune.jobs.verify import Verified, verify
    from permprune.losses.loss import Loss
    from permprune.losses.objective import Objective
    from permprune.pattern import Pattern
    from permprune.permuters.base import LocalPermuter, Permuter, Round, Run, ScorePermuter, Solution
    from permprune.permuters.identity import Identity, Random
    from permprune.permuters.learned import Learned
    from permprune.permuters.newton import Newton
    from permprune.permuters.reconstruction import Reconstruction
    from permprune.permuters.ria import RIAPermuter
    from permprune.pruning.folder import save
    from permprune.pruning.hub import push_to_hub
    from permprune.pruning.masked import LayerMeasure, MaskedLayers
    from permprune.pruning.network import PrunedNetwork
    from permprune.pruning.problem import Problem
    from permprune.saliency.base import Saliency
    from permprune.saliency.magnitude import Magnitude
    from permprune.saliency.obs import OBS
    from permprune.saliency.ria import RIA
    from permprune.saliency.wanda import Wanda
    from permprune.system.progress import disable_progress_bars, enable_progress_bars
    from permprune.updates.admm import ADMM
    from permprune.updates.base import LayerUpdate, Update
    from permprune.updates.sparsegpt import SparseGPT

__all__ = [
    "ADMM",
    "OBS",
    "RIA",
    "BenchedModel",
    "Benchmark",
    "CachedPerplexity",
    "Comparison",
    "ComparisonRow",
    "Evaluation",
    "Examples",
    "FineTuned",
    "FineTuning",
    "Forecast",
    "Identity",
    "InspectedSpace",
    "KVConfig",
    "KVRecord",
    "LayerMeasure",
    "LayerUpdate",
    "Learned",
    "LocalPermuter",
    "Loss",
    "Magnitude",
    "MaskedLayers",
    "Metric",
    "Newton",
    "Objective",
    "Packed",
    "Pattern",
    "PermpruneError",
    "Permuter",
    "Problem",
    "PruneConfig",
    "Pruned",
    "PrunedCache",
    "PrunedLayer",
    "PrunedNetwork",
    "RIAPermuter",
    "Random",
    "Reconstruction",
    "Record",
    "Result",
    "Round",
    "Run",
    "Saliency",
    "ScorePermuter",
    "Solution",
    "SparseGPT",
    "Speed",
    "Sweep",
    "SweepRow",
    "TaskList",
    "Update",
    "Verified",
    "Walk",
    "Wanda",
    "bench",
    "calibrate_kv",
    "compare",
    "coupling_rule",
    "disable_progress_bars",
    "discover",
    "enable_progress_bars",
    "evaluate",
    "evaluate_kv",
    "evaluate_model",
    "evaluate_tasks",
    "finetune",
    "fit_probe",
    "fold",
    "fold_all",
    "forecast",
    "inspect",
    "load",
    "measure_speed",
    "pack",
    "pack_folder",
    "perplexity",
    "prune",
    "prune_to_folder",
    "push_to_hub",
    "read_model",
    "save",
    "sweep",
    "unpack",
    "unpack_folder",
    "verify",
    "verify_space",
]

_MODULES = {
    "BenchedModel": "checkpoints.benchmark",
    "Benchmark": "checkpoints.benchmark",
    "Speed": "checkpoints.benchmark",
    "push_to_hub": "pruning.hub",
    "load": "checkpoints.io",
    "read_model": "checkpoints.io",
    "PrunedLayer": "checkpoints.record",
    "Record": "checkpoints.record",
    "PruneConfig": "config",
    "discover": "coupling.discovery",
    "fold": "coupling.fold",
    "fold_all": "coupling.fold",
    "verify_space": "coupling.verify",
    "Walk": "coupling.walk",
    "coupling_rule": "coupling.walk",
    "PermpruneError": "errors",
    "evaluate_model": "evaluation.dispatch",
    "TaskList": "evaluation.lm_tasks",
    "evaluate_tasks": "evaluation.lm_tasks",
    "perplexity": "evaluation.perplexity",
    "fit_probe": "evaluation.probe",
    "Metric": "evaluation.result",
    "Result": "evaluation.result",
    "measure_speed": "evaluation.speed",
    "Examples": "examples",
    "PrunedCache": "inference.kv.cache",
    "KVConfig": "inference.kv.config",
    "CachedPerplexity": "inference.kv.evaluation",
    "KVRecord": "inference.kv.files",
    "pack": "inference.pack",
    "unpack": "inference.pack",
    "bench": "jobs.bench",
    "Comparison": "jobs.compare",
    "ComparisonRow": "jobs.compare",
    "compare": "jobs.compare",
    "evaluate": "jobs.evaluate",
    "FineTuned": "jobs.finetune",
    "FineTuning": "jobs.finetune",
    "finetune": "jobs.finetune",
    "forecast": "forecasts.fitting",
    "Forecast": "forecasts.run",
    "InspectedSpace": "jobs.inspect",
    "inspect": "jobs.inspect",
    "calibrate_kv": "jobs.kv",
    "evaluate_kv": "jobs.kv",
    "Packed": "jobs.packing",
    "pack_folder": "jobs.packing",
    "unpack_folder": "jobs.packing",
    "prune_to_folder": "jobs.prune",
    "sweep": "jobs.sweep",
    "Sweep": "jobs.swept",
    "SweepRow": "jobs.swept",
    "Evaluation": "engine.measuring",
    "Verified": "jobs.verify",
    "verify": "jobs.verify",
    "Loss": "losses.loss",
    "Objective": "losses.objective",
    "Pattern": "pattern",
    "LocalPermuter": "permuters.base",
    "Permuter": "permuters.base",
    "Round": "permuters.base",
    "Run": "permuters.base",
    "ScorePermuter": "permuters.base",
    "Solution": "permuters.base",
    "Identity": "permuters.identity",
    "Random": "permuters.identity",
    "Learned": "permuters.learned",
    "Newton": "permuters.newton",
    "Reconstruction": "permuters.reconstruction",
    "RIAPermuter": "permuters.ria",
    "Pruned": "engine.pruned",
    "prune": "engine.held",
    "save": "pruning.folder",
    "LayerMeasure": "pruning.masked",
    "MaskedLayers": "pruning.masked",
    "PrunedNetwork": "pruning.network",
    "Problem": "pruning.problem",
    "Saliency": "saliency.base",
    "Magnitude": "saliency.magnitude",
    "OBS": "saliency.obs",
    "RIA": "saliency.ria",
    "Wanda": "saliency.wanda",
    "disable_progress_bars": "system.progress",
    "enable_progress_bars": "system.progress",
    "ADMM": "updates.admm",
    "LayerUpdate": "updates.base",
    "Update": "updates.base",
    "SparseGPT": "updates.sparsegpt",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("permprune")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


after_import("transformers.modeling_utils", "permprune.inference.quantizer")
