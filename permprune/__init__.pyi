from .checkpoints.io import load as load, read_model as read_model
from .checkpoints.record import Record as Record
from .config import PruneConfig as PruneConfig
from .coupling.discovery import discover as discover
from .coupling.walk import coupling_rule as coupling_rule
from .engine.held import prune as prune
from .engine.measuring import Evaluation as Evaluation
from .engine.pruned import Pruned as Pruned
from .errors import PermpruneError as PermpruneError
from .evaluation.dispatch import evaluate_model as evaluate_model
from .evaluation.lm_tasks import TaskList as TaskList, evaluate_tasks as evaluate_tasks
from .examples import Examples as Examples
from .forecasts.fitting import forecast as forecast
from .forecasts.forecast import Forecast as Forecast
from .inference.pack import pack as pack, unpack as unpack
from .jobs.bench import bench as bench
from .jobs.compare import compare as compare
from .jobs.evaluate import evaluate as evaluate
from .jobs.finetune import FineTuning as FineTuning, finetune as finetune
from .jobs.inspect import inspect as inspect
from .jobs.kv import calibrate_kv as calibrate_kv, evaluate_kv as evaluate_kv
from .jobs.kv_search import KVSearch as KVSearch
from .jobs.packing import pack_folder as pack_folder, unpack_folder as unpack_folder
from .jobs.prune import prune_to_folder as prune_to_folder
from .jobs.verify import verify as verify
from .kv.cache import PrunedCache as PrunedCache
from .kv.config import KVConfig as KVConfig
from .losses.objective import Objective as Objective
from .pattern import Pattern as Pattern
from .permuters.base import (
    LocalPermuter as LocalPermuter,
    Permuter as Permuter,
    Round as Round,
    Run as Run,
    ScorePermuter as ScorePermuter,
    Solution as Solution,
)
from .permuters.iterate import Iterative as Iterative, Landscape as Landscape, SearchState as SearchState
from .permuters.trust_region import Newton as Newton
from .pruning.folder import push_to_hub as push_to_hub, save as save
from .pruning.masked import MaskedLayers as MaskedLayers
from .pruning.network import PrunedNetwork as PrunedNetwork
from .pruning.problem import Problem as Problem
from .saliency.metrics import Saliency as Saliency
from .system.progress import (
    disable_progress_bars as disable_progress_bars,
    enable_progress_bars as enable_progress_bars,
)
from .training.train import Training as Training
from .training.zeros import (
    KeepPattern as KeepPattern,
    keep_pattern as keep_pattern,
    lora_on_packed as lora_on_packed,
    merge_adapters as merge_adapters,
)
from .updates.base import LayerUpdate as LayerUpdate, Update as Update

__version__: str
