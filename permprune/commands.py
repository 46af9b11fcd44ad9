"""The jobs of the command line, from model name to files: prune, compare, verify."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from permprune import parallel
from permprune.coupling.trace import forward_arguments, main_outputs
from permprune.data import TOGETHER, kind_of, load_examples, warn_of_overlap
from permprune.errors import PermpruneError
from permprune.evaluate import Result, evaluate_model, fit_probe, perplexity, with_head
from permprune.footprint import weight_bytes
from permprune.model_io import RECORD, load, read_model, read_record, write_weights
from permprune.offload import read_offloaded, write_offloaded
from permprune.options import Count, require
from permprune.pattern import Pattern
from permprune.permuters import LocalPermuter, Permuter, permuter
from permprune.pipeline import (
    Plan,
    Pruned,
    Settings,
    calibration_examples,
    finish,
    gap_closed,
    plan_run,
    prepare,
    short_inputs,
    update_weights,
)
from permprune.report import write_report
from permprune.resources import compute_device, keep_freed_memory, peak_memory_mb, reset_peak_memory
from permprune.streaming import DECIDED, NATURAL, Stream, exceeds_memory
from permprune.system.files import (
    WorkFolder,
    atomic_folder,
    require_absent,
    require_space,
    require_writable,
    write_json,
)
from permprune.trials import ANSWERED_ONCE, BATCH, Evaluation, Meter, Trials, transcriber
from permprune.zoo.models import MODELS

PROBE = "probe.safetensors"
"""Two examples, and what the masked model said of them in its original order: what `verify` compares with."""

ANSWER = "answer"
"""The name of what was said among the tensors of the probe."""

VERSIONED = ("permprune", "torch", "transformers", "scipy", "safetensors")


def evaluate(name: str, evaluation: Evaluation, *, trust_remote_code: bool = False) -> Result:
    """What a model, by name or folder, scores: perplexity, accuracy or word error rate.

    `trust_remote_code` is as that of `read_model`. Raises `PermpruneError` for examples that do not say what is right.
    """
    keep_freed_memory()
    model, processor, _ = read_model(name, trust_remote_code=trust_remote_code)
    examples, tokenizer = evaluation.examples(model, processor), transcriber(model, processor)
    return evaluate_model(model, examples, tokenizer, None, BATCH * TOGETHER[kind_of(model)], evaluation.metric)[0]


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

    `source` and `windows` are as those of `Evaluation`, of the part to train on; `trust_remote_code` as that of
    `read_model`. Returns the accuracy on a held-out part of it. Raises `PermpruneError`.
    """
    require("windows", windows, Count)
    require_absent(out)
    require_writable(out)
    keep_freed_memory()
    model, processor, _ = read_model(name, trust_remote_code=trust_remote_code)
    require_space(out, weight_bytes(model))
    headed = with_head(model, classes)
    fitted = fit_probe(headed, load_examples(source, headed, processor, "probe", windows * ANSWERED_ONCE))
    with atomic_folder(out) as folder:
        write_weights(fitted.model, processor, False, folder)
    return fitted.result


def prune_to_folder(
    name: str,
    out: Path,
    permute: str,
    settings: Settings,
    evaluation: Evaluation,
    resume: bool = False,
    announce: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Permute, prune, update, fold, measure, and write the checkpoint, its record and its report to `out`.

    While it runs everything lies in `out`.partial, the searches' states included; `out` appears when all is there.
    With `resume` a search goes on from its last state. `announce` is given the record before anything is written to
    `out`. Returns the record. Raises `PermpruneError`.
    """
    method = permuter(permute)
    with WorkFolder(out).held("prune", resume) as work:
        reset_peak_memory()
        started = time.monotonic()
        prune_model = _prune_streamed if exceeds_memory(name, method, settings) else _prune_held
        done = prune_model(name, method, settings, evaluation, work)
        values = done.measured
        record = _record(name, permute, settings, done.pruned) | {
            "measured": {"data": evaluation.source or "default data", **values},
            "gap_closed": gap_closed(values["pruned"], values["dense"], values["none"], values["metric"]),
            "seconds": {**done.seconds, "total": time.monotonic() - started},
            "peak_memory_mb": peak_memory_mb(),
        }
        announce(record)
        parallel.on_first(lambda: _write(done, record, work))
    return record


def compare(
    name: str, methods: Sequence[str] | Mapping[str, Permuter], settings: Settings, evaluation: Evaluation
) -> dict[str, Any]:
    """One row a method, by name or under a label, on the same calibration and saliency.

    The dense model and no permutation are always among them.

    "seconds" are those of the search, its start included; "peak_memory_mb" that of the process while it ran. "overlap"
    is the share of the evaluation that is in the calibration as well.
    """
    named = methods if isinstance(methods, Mapping) else {method: permuter(method) for method in methods}
    chosen = {"none": permuter("none"), **named}
    trials = Trials(name, settings, evaluation)
    warn_of_overlap(trials.overlap)
    dense = trials.dense.result
    rows = [trials.dense.row("dense"), *(trials.run(method).row(label) for label, method in chosen.items())]
    none = rows[1][dense.metric]
    for row in rows:
        row["gap_closed"] = gap_closed(row[dense.metric], dense.value, none, dense.metric)
    fixed = {key: getattr(settings, key) for key in ("pattern", "saliency", "mode", "update", "seed")}
    return {
        "model": name,
        **fixed,
        "calibrate_seconds": trials.prepared.seconds,
        "metric": dense.metric,
        "overlap": trials.overlap,
        "rows": rows,
    }


def verify_folder(folder: Path, *, trust_remote_code: bool = False) -> dict[str, float]:
    """Prove a folder that permprune wrote: N:M in stored order, it reloads, and it says what the masked model said.

    Returns "layers", how many were checked, and "difference", the largest of the outputs. `trust_remote_code` is as
    that of `read_model`. Raises `PermpruneError` naming the first thing that does not hold.
    """
    record = read_record(folder)
    model = load(folder, trust_remote_code=trust_remote_code)
    require_patterns(model, record)
    probe = load_file(folder / PROBE)
    expected = probe.pop(ANSWER)
    rounding = 8 * torch.finfo(model.dtype).eps if model.dtype.itemsize < 4 else 0.0
    difference = float((_answer(model, probe) - expected).abs().max())
    if not difference <= max(1e-4, rounding * float(expected.abs().max())):
        raise PermpruneError(f"{folder} says other than the masked model did (outputs differ by {difference:.2g})")
    return {"layers": len(record["layers"]), "difference": difference}


def require_patterns(model: PreTrainedModel, record: Mapping[str, Any]) -> None:
    """Raise `PermpruneError` unless every layer of a record holds its pattern in stored order."""
    for row in record["layers"]:
        module = model.get_submodule(row["name"])
        weight = module.weight.T if row["transposed"] else module.weight
        pattern = Pattern.parse(row["pattern"])
        if not pattern.holds(weight):  # type: ignore[arg-type]
            raise PermpruneError(f"{row['name']} is not {pattern} in stored order: prune the model again")


@dataclasses.dataclass
class _Done:
    """A pruned model, what was measured of it, and how to write its weights and tokenizer to a folder.

    `measured` has the "metric" of the dense model ("dense"), and pruned in natural order ("none") and as decided
    ("pruned"), and over how many ("count") of what ("unit"); `probe` is what `verify_folder` compares with.
    """

    pruned: Pruned
    measured: dict[str, Any]
    seconds: dict[str, float]
    probe: dict[str, Tensor]
    write: Callable[[Path], None]


def _prune_held(name: str, method: Permuter, settings: Settings, evaluation: Evaluation, work: WorkFolder) -> _Done:
    """Prune a model that is held in memory."""
    model, processor, stored = read_model(name, trust_remote_code=settings.trust_remote_code)
    require_space(work.out, weight_bytes(model, stored))
    prepared = prepare(model, processor, settings, partial=work.path)
    require_space(work.out, weight_bytes(model, stored) + method.state_bytes(prepared.network))
    with prepared.network.dense_weights():
        measure = Meter(model, processor, evaluation)
        dense = measure()
    update_weights(prepared)
    natural, none = prepared.network.measures(), measure()
    solution = method.solve(prepared.network, prepared.run)
    searched = time.monotonic()
    update_weights(prepared)
    seconds = {"calibrate": prepared.seconds, "search": solution.seconds, "update": time.monotonic() - searched}
    probe = _probe(model, prepared)
    pruned = finish(prepared, solution, natural)
    values = _measured(dense, none, measure())

    def write(folder: Path) -> None:
        model.to(stored)  # type: ignore[arg-type]
        write_weights(model, processor, bool(pruned.gathers), folder)

    return _Done(pruned, values, seconds, probe, write)


def _prune_streamed(name: str, method: Permuter, settings: Settings, evaluation: Evaluation, work: WorkFolder) -> _Done:
    """Prune a model that is read layer by layer, by a method and settings that `exceeds_memory` let pass."""
    started = time.monotonic()
    rank, trust = f"rank-{parallel.rank()}", settings.trust_remote_code
    model, processor, stored, weights = read_offloaded(name, work.scratch / rank, trust_remote_code=trust)
    require_space(work.out, weight_bytes(model, stored))
    examples = evaluation.examples(model, processor)
    plan = plan_run(model, settings, calibration_examples(model, processor, settings), weights.stored)
    stream = Stream(model, weights, plan, work.path / rank)
    require_space(work.out, weight_bytes(model, stored) + parallel.world() * stream.state_bytes)
    pruned = stream.solve(cast(LocalPermuter, method))
    calibrated = time.monotonic() - started - stream.seconds
    seconds = {"calibrate": calibrated, "search": pruned.solution.seconds, "update": 0.0}
    results = []
    for edit in (None, stream.masked(NATURAL), stream.masked(DECIDED)):
        weights.edit = edit
        results.append(perplexity(model, examples))
    values = _measured(*results)
    probe = _probe(model, plan)
    weights.edit = stream.stored(pruned)

    def write(folder: Path) -> None:
        write_offloaded(model, processor, weights, stored, bool(pruned.gathers), folder, cast(int, settings.memory))

    return _Done(pruned, values, seconds, probe, write)


def _measured(dense: Result, none: Result, pruned: Result) -> dict[str, Any]:
    values = {"dense": dense.value, "none": none.value, "pruned": pruned.value}
    return {"metric": dense.metric, **values, "count": dense.count, "unit": dense.unit}


def _probe(model: PreTrainedModel, plan: Plan) -> dict[str, Tensor]:
    """Two examples, of windows of text the first few tokens, and what the model says of them (`answered`)."""
    return answered(model, short_inputs(model, plan.run.held_out))


def answered(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A probe: inputs by the names of the model's arguments, and as `ANSWER` what it says of them; on the CPU."""
    own = {name: tensor.cpu().contiguous() for name, tensor in inputs.items() if name != ANSWER}
    return {**own, ANSWER: _answer(model, own)}


@torch.inference_mode()
def _answer(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """The first of a model's main outputs at the last position, fp32 (batch, classes or channels)."""
    device = compute_device(model)
    arguments = forward_arguments(model, {name: tensor.to(device) for name, tensor in inputs.items()})
    output: Tensor = main_outputs(model(**arguments))[0]
    return (output[:, -1] if output.dim() > 2 else output).float().cpu().contiguous()


def _record(name: str, permute: str, settings: Settings, pruned: Pruned) -> dict[str, Any]:
    return {
        "format": 1,
        "version": importlib.metadata.version("permprune"),
        "model": name,
        "note": note(name),
        "settings": {"permute": permute, **dataclasses.asdict(settings)},
        "versions": {package: importlib.metadata.version(package) for package in VERSIONED},
        "layers": pruned.layers,
        "curve": [dataclasses.asdict(point) for point in pruned.solution.curve],
        "permutations": {space: table.tolist() for space, table in pruned.tables.items()},
        "gathers": pruned.gathers,
        "sample": pruned.sample,
    }


def note(name: str) -> str | None:
    """What readers of results must know about a model of the zoo."""
    return MODELS[name].note if name in MODELS else None


def _write(done: _Done, record: dict[str, Any], work: WorkFolder) -> None:
    with atomic_folder(work.out, work.scratch, "free space, then repeat with --resume") as folder:
        done.write(folder)
        save_file(done.probe, folder / PROBE)
        write_json(folder / RECORD, record)
        write_report(record, folder / "report.html")
