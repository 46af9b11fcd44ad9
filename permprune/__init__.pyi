from .checkpoints.benchmark import (
    BenchedModel as BenchedModel,
    Benchmark as Benchmark,
    Speed as Speed,
    Throughput as Throughput,
)
from .checkpoints.io import load as load, read_model as read_model
from .checkpoints.record import PrunedLayer as PrunedLayer, Record as Record
from .config import PruneConfig as PruneConfig
from .coupling.discovery import discover as discover
from .coupling.fold import fold as fold, fold_all as fold_all, verify_space as verify_space
from .coupling.walk import Walk as Walk, coupling_rule as coupling_rule
from .engine.held import prune as prune
from .engine.measuring import Evaluation as Evaluation
from .engine.pruned import Pruned as Pruned
from .errors import PermpruneError as PermpruneError
from .evaluation.dispatch import evaluate_model as evaluate_model
from .evaluation.lm_tasks import TaskList as TaskList, evaluate_tasks as evaluate_tasks
from .evaluation.perplexity import perplexity as perplexity
from .evaluation.result import Metric as Metric, Result as Result
from .evaluation.speed import measure_speed as measure_speed
from .examples import Examples as Examples
from .forecasts.fitting import forecast as forecast
from .forecasts.forecast import Forecast as Forecast
from .inference.pack import pack as pack, unpack as unpack
from .jobs.bench import bench as bench
from .jobs.cells import Comparison as Comparison, ComparisonRow as ComparisonRow
from .jobs.compare import compare as compare
from .jobs.evaluate import evaluate as evaluate
from .jobs.finetune import FineTuned as FineTuned, FineTuning as FineTuning, finetune as finetune
from .jobs.inspect import InspectedSpace as InspectedSpace, inspect as inspect
from .jobs.kv import calibrate_kv as calibrate_kv, evaluate_kv as evaluate_kv
from .jobs.kv_search import KVSearch as KVSearch
from .jobs.packing import Packed as Packed, pack_folder as pack_folder, unpack_folder as unpack_folder
from .jobs.prune import prune_to_folder as prune_to_folder
from .jobs.verify import Verified as Verified, verify as verify
from .kv.cache import PrunedCache as PrunedCache
from .kv.config import KVConfig as KVConfig
from .kv.evaluation import CachedPerplexity as CachedPerplexity
from .kv.files import KVRecord as KVRecord
from .losses.objective import Loss as Loss, Objective as Objective
from .pattern import Pattern as Pattern
from .permuters.base import (
    Identity as Identity,
    LocalPermuter as LocalPermuter,
    Permuter as Permuter,
    Random as Random,
    Round as Round,
    Run as Run,
    ScorePermuter as ScorePermuter,
    Solution as Solution,
)
from .permuters.iterate import Iterative as Iterative, Landscape as Landscape, SearchState as SearchState
from .permuters.kept import RIAPermuter as RIAPermuter
from .permuters.learned import Learned as Learned
from .permuters.reconstruction import Reconstruction as Reconstruction
from .permuters.trust_region import Newton as Newton
from .pruning.folder import push_to_hub as push_to_hub, save as save
from .pruning.masked import LayerMeasure as LayerMeasure, MaskedLayers as MaskedLayers
from .pruning.network import PrunedNetwork as PrunedNetwork
from .pruning.problem import Problem as Problem
from .saliency.metrics import (
    OBS as OBS,
    RIA as RIA,
    Magnitude as Magnitude,
    Saliency as Saliency,
    Wanda as Wanda,
)
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
from .updates.methods import ADMM as ADMM, SparseGPT as SparseGPT

__version__: str
