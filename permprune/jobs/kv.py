"""The job of `permprune kv`: find the channel orders of a pruned cache, measure it and write it."""

from __future__ import annotations

import bisect
import dataclasses
import importlib.metadata
import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from permprune.checkpoints.origin import origin_of
from permprune.checkpoints.source import ModelSource, OpenModel, open_model
from permprune.data.load import load_examples
from permprune.engine.measuring import Evaluation
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.jobs.kv_search import KVSearch
from permprune.kv.cache import PrunedCache, attention_layers
from permprune.kv.calibration import SIDES, ObservedLayer, fit_channels, observe_states
from permprune.kv.config import AUTO, KVConfig, bits_of, default_pattern, pattern_of
from permprune.kv.evaluation import CachedPerplexity, CacheMeter
from permprune.kv.files import CacheMeasurement, Kept, KVRecord, LayerChannels, shape_of, weights_of, write_cache
from permprune.kv.folding import fold_values
from permprune.kv.tiers import BitErrors, choose_means, measure_bits, outputs_of
from permprune.models.forward import short_inputs
from permprune.models.modality import EVALUATION_BATCH, clipped_length
from permprune.models.processors import Processor
from permprune.pattern import MIXED, Pattern
from permprune.permuters.base import ScorePermuter
from permprune.permuters.registry import score_permuter
from permprune.pruning.folder import write_model
from permprune.pruning.problem import Part, Problem
from permprune.system.failures import failures_reported
from permprune.system.files import atomic_folder, require_new
from permprune.system.progress import CALIBRATE, MEASURE, READ, WRITE, stage, stages, track


@failures_reported()
@stages(READ, CALIBRATE, MEASURE, WRITE)
def calibrate_kv(
    model: ModelSource,
    out: str | Path,
    config: KVConfig | None = None,
    *,
    search: KVSearch | None = None,
    evaluation: Evaluation | None = None,
    processor: Processor | None = None,
    fold: str | Path | None = None,
    trust_remote_code: bool = False,
) -> KVRecord:
    """Find the channels of a pruned key/value cache, measure its perplexity, and write both to the folder `out`.

    `model` is a name, a folder, or a model in memory with its `processor`. One forward pass over the text of `search`
    shows queries, keys and values. By default each head gets bits of its own, in keys and in values
    (`permprune.kv.tiers`); the patterns of `config` are then left "auto". Any other settings of the kept channels
    choose patterns, whose groups keep the most of the squared keys, weighted by the mean squared queries, and of the
    squared values. The values of a model that permprune pruned stay in its order, whose groups `prune` has chosen.

    With `fold`, the order of the values is folded into the model's weights, so that a cache need not reorder them: the
    model with these weights, for which the cache then is, is written to that folder. A model in memory is changed in
    place. Its outputs stay the same.

    The perplexity is that of text as `evaluation` says. Returns the record. Raises `PermpruneError`, for example if a
    pattern does not divide the channels of a head.
    """
    config, search, evaluation = config or KVConfig(), search or KVSearch(), evaluation or Evaluation()
    out, fold = Path(out), None if fold is None else Path(fold)
    config = _with_budget(config, search)
    _require_effect(config, {"order": score_permuter(search.order).name != "ria", "fold": fold is not None})
    _require_folders(out, fold)
    opened = open_model(model, processor, trust_remote_code=trust_remote_code)
    if fold is not None and origin_of(opened.model).record is not None:
        raise PermpruneError(f"the values of {opened.name} have the order that prune gave them: leave out --fold")
    attention_layers(opened.model)
    search = dataclasses.replace(search, length=clipped_length(opened.model, search.length))
    examples, unseen = _windows(opened, search, 0 if search.max_loss is None else evaluation.windows)
    stage(CALIBRATE)
    started = time.monotonic()
    channels, record = _search(opened, config, search, examples=examples, unseen=unseen)
    if fold is not None:
        if all(values.is_natural for _, values in channels.values()):
            raise PermpruneError(f"values of the pattern {record.config.values} need no order: leave out --fold")
        channels = fold_values(opened.model, channels, short_inputs(opened.model, examples))
        record = dataclasses.replace(record, model=str(fold))
    seconds = time.monotonic() - started
    stage(MEASURE)
    windows = evaluation.examples(opened.model, opened.processor)
    measured = CacheMeter(opened.model, record.config, windows, evaluation.source).compare(channels)
    record = dataclasses.replace(record, seconds=seconds, measured=measured, weights=weights_of(opened.model))
    stage(WRITE)
    if fold is not None:
        with atomic_folder(fold) as folder:
            write_model(opened.model, opened.processor, folder)
    with atomic_folder(out) as folder:
        write_cache(folder, channels, record)
    return record


def _search(
    opened: OpenModel, config: KVConfig, search: KVSearch, *, examples: Examples, unseen: Examples
) -> tuple[LayerChannels, KVRecord]:
    """Return the channels of a cache, and its record without what is measured.

    The states of the model on the `examples` are observed, and a limit of the loss holds on the `unseen` ones.
    """
    observed = observe_states(opened.model, examples, skipped=config.sinks, batch=EVALUATION_BATCH)
    method, budget, kept, chosen = score_permuter(search.order), search.budget, dict[str, Kept](), None
    if config.keys == config.values == MIXED:
        errors = measure_bits(observed)
        if search.max_loss is not None:
            meter = CacheMeter(opened.model, config, unseen, search.calibration)
            budget, chosen = _least_bytes(errors, meter, search.max_loss)
        budget = errors.usual if budget is None else budget
        channels = errors.channels(budget)
    else:
        config = _with_patterns(config, observed)
        natural_values = origin_of(opened.model).record is not None
        channels, kept = find_channels(observed, config, method, search.seed, order_values=not natural_values)
    record = KVRecord(
        format=1,
        permprune=importlib.metadata.version("permprune"),
        model=opened.name,
        shape=shape_of(opened.model),
        config=config,
        order=method.name if kept else "",
        calibration={
            "data": search.calibration,
            "samples": search.samples,
            "length": search.length,
            "seed": search.seed,
        },
        kept=kept,
        seconds=0.0,
        budget=budget,
        chosen=chosen,
    )
    return channels, record


def _require_folders(out: Path, fold: Path | None) -> None:
    """Raise `PermpruneError` if the cache and the folded model cannot be written to these folders."""
    if fold is not None and fold.resolve() == out.resolve():
        raise PermpruneError(f"the cache and the folded model are both to be {out}: give --fold another folder")
    for folder in (out, fold):
        if folder is not None:
            require_new(folder)


def _windows(opened: OpenModel, search: KVSearch, apart: int) -> tuple[Examples, Examples]:
    """Return windows of the calibration text: those to observe, and up to `apart` of other documents.

    Raises `PermpruneError` if the text has a single window and two are needed.
    """
    examples = load_examples(
        search.calibration, opened.model, opened.processor,
        part="calibration", count=search.samples + apart, length=search.length, seed=search.seed, apart=apart,
    )  # fmt: skip
    held_out = min(apart, len(examples) // 2)
    if apart and not held_out:
        raise PermpruneError("--max-loss chooses on a part of the calibration text, which has one window: give more")
    return examples[held_out:], examples[:held_out]


def _with_budget(config: KVConfig, search: KVSearch) -> KVConfig:
    """Return the settings for a search: mixed patterns, unless the settings choose patterns.

    Raises `PermpruneError` if they do and the search has a limit.
    """
    plain = config.dtype == KVConfig.dtype and config.recovery == KVConfig.recovery
    mixes = plain and {config.keys, config.values} <= {AUTO, MIXED}
    limited = search.budget is not None or search.max_loss is not None
    if not mixes and (limited or MIXED in (config.keys, config.values)):
        raise PermpruneError(
            "each head has bits of its own: leave out --pattern, --keys, --values, --dtype and --recovery"
        )
    return config.replace(keys=MIXED, values=MIXED) if mixes else config


def _require_effect(config: KVConfig, given: Mapping[str, bool]) -> None:
    """Raise `PermpruneError` for options that are `given` although they change nothing without an N:M pattern."""
    coded = all(text == MIXED or bits_of(text) is not None for text in (config.keys, config.values))
    changed = {name: getattr(config, name) != getattr(KVConfig, name) for name in ("dtype", "recovery")}
    useless = [f"--{name}" for name, changes in {**given, **changed}.items() if coded and changes]
    if useless:
        raise PermpruneError(
            f"states of few bits have no N:M groups: leave out {', '.join(useless)}, or give an N:M --pattern"
        )


def _least_bytes(measured: BitErrors, meter: CacheMeter, max_loss: float) -> tuple[float, CacheMeasurement]:
    """Return the fewest bytes, in steps of 1 % of 16 bits, with which perplexity grows by at most a share, its standard
    error included, and both perplexities. Raises `PermpruneError` if it grows by more with the most bytes."""
    by_percent: dict[int, CacheMeasurement] = {}

    def fits(percent: int) -> bool:
        found = by_percent[percent] = meter.compare(measured.channels(percent / 100))
        return found.lost + (found.error or 0.0) <= max_loss

    least, most = math.ceil(100 * measured.range[0]), math.floor(100 * measured.range[1])
    if not fits(most):
        raise PermpruneError(
            f"with {most} % of the bytes of 16 bits the perplexity grows by more than {max_loss:.2%}: "
            "allow more, or keep a pattern with int8 or bf16 values"
        )
    percent = least + bisect.bisect_left(range(least, most), True, key=fits)
    return percent / 100, by_percent[percent]


def _with_patterns(config: KVConfig, observed: Mapping[int, ObservedLayer]) -> KVConfig:
    """Return the settings with the default patterns of these layers in place of "auto"."""
    widths = {side: [layer.width_of(side) for layer in observed.values()] for side in SIDES}
    chosen = [side for side in SIDES if getattr(config, side) == AUTO]
    return config.replace(**{side: str(default_pattern(math.gcd(*widths[side]))) for side in chosen})


def find_channels(
    observed: Mapping[int, ObservedLayer],
    config: KVConfig,
    method: ScorePermuter,
    seed: int = 0,
    *,
    order_values: bool = True,
) -> tuple[LayerChannels, dict[str, Kept]]:
    """Return the channels of all layers, and the share of the score that is kept, by "keys" and "values".

    `observed` are the states of each layer (`observe_states`). Without `order_values`, values stay in their order.
    """
    generator = torch.Generator().manual_seed(seed)
    shares: dict[str, list[Tensor]] = {side: [] for side in SIDES}
    channels: LayerChannels = {}
    for number in track(sorted(observed), "ordering channels"):
        layer, sides = observed[number], []
        for side in SIDES:
            (states, weight), text = layer.side(side), getattr(config, side)
            if (bits := bits_of(text)) is not None:
                moving = choose_means(layer, outputs_of(layer)) if side == "keys" else None
                sides.append(layer.coded(side, torch.full((layer.heads,), bits), moving))
                continue
            pattern = pattern_of(text, states.shape[2])
            score = (states * weight[:, None]).square()
            order = natural = torch.arange(states.shape[2]).repeat(len(states), 1)
            if pattern is not None:
                if side == "keys" or order_values:
                    order = torch.stack([_order(head, pattern, method, generator) for head in score])
                shares[side].append(torch.stack([_kept(score, o, pattern) for o in (natural, order)]))
            sides.append(fit_channels(states, weight, order, pattern))
        channels[number] = sides[0], sides[1]
    kept = {side: Kept(*torch.stack(pairs).mean(0).tolist()) for side, pairs in shares.items() if pairs}
    return channels, kept


@dataclasses.dataclass(frozen=True)
class _HeadScores:
    """The score of a head's channels, (tokens, channels), as permuters read it."""

    scores: Mapping[str, Tensor]
    pattern: Pattern

    def pattern_of(self, problem: Problem) -> Pattern:
        return self.pattern

    def rows_of(self, problem: Problem) -> int:
        return sum(len(self.scores[part.layer]) for part in problem.parts)


def _order(score: Tensor, pattern: Pattern, method: ScorePermuter, generator: torch.Generator) -> Tensor:
    """Return the order of a head's channels, int64 (width,), for their score, (tokens, width)."""
    width = score.shape[1]
    if width == pattern.m:  # a single group: all orders keep the same
        return torch.arange(width)
    problem = Problem("head", width, (Part("head", "", torch.arange(width)),))
    return method.order(_HeadScores({"head": score}, pattern), problem, generator)


def _kept(score: Tensor, order: Tensor, pattern: Pattern) -> Tensor:
    """Return the share of the score, (heads, tokens, width), that groups in this order keep, mean over heads."""
    grouped = score.gather(2, order[:, None].expand_as(score)).unflatten(2, (-1, pattern.m))
    kept: Tensor = (grouped * pattern.mask_groups(grouped, -1)).flatten(1).sum(1)
    return (kept / score.flatten(1).sum(1)).mean()


@failures_reported()
@stages(READ, MEASURE)
def evaluate_kv(
    model: ModelSource,
    folder: str | Path,
    evaluation: Evaluation | None = None,
    processor: Processor | None = None,
    *,
    trust_remote_code: bool = False,
) -> CachedPerplexity:
    """Measure the perplexity of a model with the pruned cache in `folder`, and the bytes of the cache.

    All tokens before the window are pruned, also those of a prompt (`PrunedCache.exact_window`). `model`, `evaluation`
    and `processor` are as in `evaluate`. Raises `PermpruneError`, for example if the cache is for another model.
    """
    evaluation = evaluation or Evaluation()
    opened = open_model(model, processor, trust_remote_code=trust_remote_code)
    cache = PrunedCache.from_pretrained(folder, opened.model)  # refused before the data are read
    stage(MEASURE)
    windows = evaluation.examples(opened.model, opened.processor)
    return CacheMeter(opened.model, cache.config, windows, evaluation.source).cached(cache.channels)
