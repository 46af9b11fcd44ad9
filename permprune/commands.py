"""The jobs of the command line, from model name to files: prune, compare, verify."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from permprune import parallel
from permprune.checkpoint import write_json
from permprune.data import load_documents, tokenize
from permprune.errors import PermpruneError
from permprune.evaluate import Result, perplexity
from permprune.model_io import RECORD, load, read_model, read_record, write_weights
from permprune.offload import read_offloaded, write_offloaded
from permprune.pattern import Pattern
from permprune.permuters import LocalPermuter, Permuter, permuter
from permprune.pipeline import Plan, Pruned, Settings, finish, gap_closed, plan_run, prepare, update_weights
from permprune.processors import Processor, tokenizer_of
from permprune.progress import log
from permprune.report import write_report
from permprune.resources import compute_device, peak_memory_mb, reset_peak_memory
from permprune.streaming import DECIDED, NATURAL, Stream, exceeds_memory
from permprune.zoo.models import MODELS

PROBE = "probe.safetensors"
"""A few tokens, and what the masked model said of them in its original order: what `verify` compares with."""

VERSIONED = ("permprune", "torch", "transformers", "scipy", "safetensors")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Text to measure perplexity on: a source (None: the default text), and how many windows of how many tokens."""

    source: str | None = None
    windows: int = 24
    length: int = 512

    def tokens(self, processor: Processor | None) -> Tensor:
        documents = load_documents(self.source, "evaluation")
        return tokenize(documents, tokenizer_of(processor), self.length, self.windows, fewer=True)


def evaluate(name: str, evaluation: Evaluation) -> Result:
    """Perplexity of a model by name or folder."""
    model, tokenizer, _ = read_model(name)
    return perplexity(model, evaluation.tokens(tokenizer))


def prune_to_folder(
    name: str, out: Path, permute: str, settings: Settings, evaluation: Evaluation, resume: bool = False
) -> dict[str, Any]:
    """Permute, prune, update, fold, measure, and write the checkpoint, its record and its report to `out`.

    While it runs everything lies in `out`.partial, the searches' states included; `out` appears when all is there.
    With `resume` a search goes on from its last state. Returns the record. Raises `PermpruneError`.
    """
    partial = out.with_name(out.name + ".partial")
    _require_free(out)
    if not resume and not parallel.rank():
        shutil.rmtree(partial, ignore_errors=True)
    parallel.wait()
    method = permuter(permute)
    reset_peak_memory()
    started = time.monotonic()
    prune_model = _prune_streamed if exceeds_memory(name, method, settings) else _prune_held
    done = prune_model(name, method, settings, evaluation, partial)
    values = done.perplexities
    record = _record(name, permute, settings, done.pruned) | {
        "perplexity": {"data": evaluation.source or "default text", **values},
        "gap_closed": gap_closed(values["pruned"], values["dense"], values["none"]),
        "seconds": {**done.seconds, "total": time.monotonic() - started},
        "peak_memory_mb": peak_memory_mb(),
    }
    if not parallel.rank():
        _write(done, record, partial / "model")
        os.replace(partial / "model", out)
        shutil.rmtree(partial)
    parallel.wait()
    return record


def compare(
    name: str, methods: Sequence[str] | Mapping[str, Permuter], settings: Settings, evaluation: Evaluation
) -> dict[str, Any]:
    """One row a method, by name or under a label, on the same calibration and saliency.

    The dense model and no permutation are always among them.

    "seconds" are those of the search, its start included; "peak_memory_mb" that of the process while it ran.
    """
    named = methods if isinstance(methods, Mapping) else {method: permuter(method) for method in methods}
    chosen = {"none": permuter("none"), **named}
    rows: list[dict[str, Any]] = []
    reset_peak_memory()
    model, tokenizer, _ = read_model(name)
    tokens = evaluation.tokens(tokenizer)
    prepared = prepare(model, tokenizer, settings)
    with prepared.network.dense_weights():
        dense = perplexity(model, tokens).value
    rows.append({"method": "dense", "perplexity": dense, "seconds": 0.0, "peak_memory_mb": peak_memory_mb()})
    for label, method in chosen.items():
        reset_peak_memory()
        solution = method.solve(prepared.network, prepared.run)
        update_weights(prepared)
        value = perplexity(model, tokens).value
        rows.append(
            {
                "method": label,
                "perplexity": value,
                "seconds": solution.seconds,
                "peak_memory_mb": peak_memory_mb(),
            }
        )
        log.info("%s: perplexity %.2f after %.0f s", label, value, solution.seconds)
    none = rows[1]["perplexity"]
    for row in rows:
        row["gap_closed"] = gap_closed(row["perplexity"], dense, none)
    fixed = {key: getattr(settings, key) for key in ("pattern", "saliency", "mode", "update", "seed")}
    return {"model": name, **fixed, "calibrate_seconds": prepared.seconds, "rows": rows}


def verify_folder(folder: Path) -> dict[str, float]:
    """Prove a folder that permprune wrote: N:M in stored order, it reloads, and it says what the masked model said.

    Returns "layers", how many were checked, and "difference", the largest of the logits. Raises `PermpruneError`
    naming the first thing that does not hold.
    """
    record = read_record(folder)
    pattern = Pattern.parse(record["settings"]["pattern"])
    model = load(folder)
    for row in record["layers"]:
        module = model.get_submodule(row["name"])
        weight = module.weight.T if row["transposed"] else module.weight
        if not pattern.holds(weight):  # type: ignore[arg-type]
            raise PermpruneError(f"{row['name']} is not {pattern} in stored order: prune the model again")
    with safe_open(folder / PROBE, "pt") as file:
        ids, expected = file.get_tensor("ids"), file.get_tensor("logits")
    rounding = 8 * torch.finfo(model.dtype).eps if model.dtype.itemsize < 4 else 0.0
    difference = float((_last_logits(model, ids) - expected).abs().max())
    if not difference <= max(1e-4, rounding * float(expected.abs().max())):
        raise PermpruneError(f"{folder} says other than the masked model did (logits differ by {difference:.2g})")
    return {"layers": len(record["layers"]), "difference": difference}


def _require_free(out: Path) -> None:
    if out.exists():
        raise PermpruneError(f"{out} exists already: remove it, or choose another --out")
    if not out.absolute().parent.exists():
        raise PermpruneError(f"there is no folder {out.absolute().parent} to write into: create it")


@dataclasses.dataclass
class _Done:
    """A pruned model, what was measured of it, and how to write its weights and tokenizer to a folder.

    `perplexities` are those of the dense model ("dense"), and pruned in natural order ("none") and as decided
    ("pruned"), with the number of "tokens"; `probe` is what `verify_folder` compares with.
    """

    pruned: Pruned
    perplexities: dict[str, Any]
    seconds: dict[str, float]
    probe: dict[str, Tensor]
    write: Callable[[Path], None]


def _prune_held(name: str, method: Permuter, settings: Settings, evaluation: Evaluation, partial: Path) -> _Done:
    """Prune a model that is held in memory."""
    model, tokenizer, stored = read_model(name)
    tokens = evaluation.tokens(tokenizer)
    prepared = prepare(model, tokenizer, settings, partial=partial)
    update_weights(prepared)
    natural, values = prepared.network.measures(), {"tokens": tokens.numel(), "none": perplexity(model, tokens).value}
    with prepared.network.dense_weights():
        values["dense"] = perplexity(model, tokens).value
    solution = method.solve(prepared.network, prepared.run)
    searched = time.monotonic()
    update_weights(prepared)
    seconds = {"calibrate": prepared.seconds, "search": solution.seconds, "update": time.monotonic() - searched}
    probe = _probe(model, prepared)
    pruned = finish(prepared, solution, natural)
    values["pruned"] = perplexity(model, tokens).value

    def write(folder: Path) -> None:
        model.to(stored)  # type: ignore[arg-type]
        write_weights(model, tokenizer, bool(pruned.gathers), folder)

    return _Done(pruned, values, seconds, probe, write)


def _prune_streamed(name: str, method: Permuter, settings: Settings, evaluation: Evaluation, partial: Path) -> _Done:
    """Prune a model that is read layer by layer, by a method and settings that `exceeds_memory` let pass."""
    started = time.monotonic()
    own = partial / f"rank-{parallel.rank()}"
    model, tokenizer, stored, weights = read_offloaded(name, own / "weights")
    tokens = evaluation.tokens(tokenizer)
    plan = plan_run(model, tokenizer, settings)
    stream = Stream(model, weights, plan, own / "masks")
    pruned = stream.solve(cast(LocalPermuter, method))
    search = pruned.solution.seconds
    seconds = {"calibrate": time.monotonic() - started - search, "search": search, "update": 0.0}
    values: dict[str, Any] = {"tokens": tokens.numel()}
    for label, edit in {"dense": None, "none": stream.masked(NATURAL), "pruned": stream.masked(DECIDED)}.items():
        weights.edit = edit
        values[label] = perplexity(model, tokens).value
    probe = _probe(model, plan)
    weights.edit = stream.stored(pruned)

    def write(folder: Path) -> None:
        write_offloaded(model, tokenizer, weights, stored, bool(pruned.gathers), folder, cast(int, settings.memory))

    return _Done(pruned, values, seconds, probe, write)


def _probe(model: PreTrainedModel, plan: Plan) -> dict[str, Tensor]:
    ids = plan.run.held_out["input_ids"][:2, :16].cpu().contiguous()
    return {"ids": ids, "logits": _last_logits(model, ids)}


@torch.inference_mode()
def _last_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of the last token, fp32 (batch, vocabulary), from a model in evaluation mode."""
    logits: Tensor = model(input_ids=ids.to(compute_device(model)), use_cache=False).logits[:, -1]
    return logits.float().cpu().contiguous()


def _record(name: str, permute: str, settings: Settings, pruned: Pruned) -> dict[str, Any]:
    return {
        "format": 1,
        "version": importlib.metadata.version("permprune"),
        "model": name,
        "note": MODELS[name].note if name in MODELS else None,
        "settings": {"permute": permute, **dataclasses.asdict(settings)},
        "versions": {package: importlib.metadata.version(package) for package in VERSIONED},
        "layers": pruned.layers,
        "curve": [dataclasses.asdict(point) for point in pruned.solution.curve],
        "permutations": {space: table.tolist() for space, table in pruned.tables.items()},
        "gathers": pruned.gathers,
    }


def _write(done: _Done, record: dict[str, Any], folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        done.write(folder)
        save_file(done.probe, folder / PROBE)
    except OSError as error:
        raise PermpruneError(
            f"cannot write {folder}: {error.strerror or error}; free space, then repeat with --resume"
        ) from error
    write_json(folder / RECORD, _finite(record))
    write_report(record, folder / "report.html")


def _finite(value: Any) -> Any:
    """The same with infinities and NaN as None, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
