"""Perplexity and bytes of pruned key/value caches: a Markdown table.

Every token is pruned but those of the window and the sinks, in prompts too. "factor" is the perplexity divided by that
with a dense cache, with the standard error of the paired difference of the log-perplexity over blocks of 128 tokens.
"KL" is the mean Kullback-Leibler divergence of the distribution of the next token from that with the dense cache, in
nats, and "top-1" how often both have the same likeliest token. The bytes are those of the storages of a cache that
holds one window of states in bf16, divided by those of a dense bf16 cache. Orders are found on the calibration text.

`--table orders` compares keys and values, orders and recoveries; `patterns` has keys alone, and keys and values, in
the order of `ria` only; `rivals` other choices of channels at equal bytes, by their descriptions: ThinK (arXiv
2407.21018), which keeps the same channels of all tokens and so needs no mask; Mustafar (2505.22913), which keeps the
largest channels of each token; SparK (2508.15212), which weights them by the queries and recovers the others from
their signs. `int4` is our own reference of a cache with 4 bits for each state and two bf16 numbers for each group of
channels of a token and head (Transformers' `QuantizedCache` needs quanto or hqq). `quantised` are caches that keep all
channels in 4, 3 or 2 bits (kv_rivals.py), and ours in few bits: of each head by a budget, or of every head the same.

python benchmarks/kv_cache.py --data wiki.test.raw --calibration wiki.valid.raw --windows 4 --length 1024
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from kv_rivals import QUANTISED, SPARK, MakeLayer, Ranged, layer_of
from torch import Tensor
from transformers import PreTrainedModel

from permprune.checkpoints.io import read_model
from permprune.data.load import load_examples
from permprune.examples import Examples
from permprune.jobs.kv import find_channels
from permprune.kv.bands import MixedLayer
from permprune.kv.cache import PrunedCache
from permprune.kv.calibration import ObservedLayer, observe_states
from permprune.kv.config import KVConfig, default_pattern
from permprune.kv.evaluation import cached_logits
from permprune.kv.files import LayerChannels
from permprune.kv.layer import PackedCacheLayer
from permprune.kv.packing import Channels
from permprune.kv.tiers import measure_bits
from permprune.permuters.base import Identity
from permprune.permuters.kept import RIAPermuter
from permprune.system.device import dtype_named

Observed = Mapping[int, ObservedLayer]

BLOCK = 128
"""Number of tokens of a block, whose mean losses are taken to be independent."""


@dataclass
class Row:
    """A row of the table: a method, its settings, channels and layers, and the bits a channel that it does not need."""

    method: str
    config: KVConfig
    channels: LayerChannels
    spared: float = 0.0
    layer: MakeLayer | type[MixedLayer] = PackedCacheLayer
    stored: str = ""

    def cells(self) -> dict[str, str]:
        config = self.config
        return {
            "method": self.method,
            "keys": config.keys,
            "values": config.values,
            "recovery": config.recovery,
            "stored": self.stored or config.dtype,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="type in which the model computes")
    parser.add_argument("--table", choices=TABLES, default="orders")
    parser.add_argument("--data", help="text to evaluate on; the default text if absent")
    parser.add_argument("--calibration", help="text to find the orders on; the default text if absent")
    parser.add_argument("--samples", type=int, default=16, help="windows of calibration text, 512 tokens each")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--window", type=int, default=KVConfig.window)
    parser.add_argument("--sinks", type=int, default=KVConfig.sinks)
    parser.add_argument("--rows", help="file to which the rows are added as JSON lines; rows that it has are left out")
    options = parser.parse_args()
    model, tokenizer, _ = read_model(options.model)
    model = model.to(dtype_named(options.dtype))
    shown = load_examples(
        options.calibration, model, tokenizer, part="calibration", count=options.samples, length=512, seed=0
    )
    windows = load_examples(
        options.data, model, tokenizer, part="evaluation", count=options.windows, length=options.length
    )
    observed = observe_states(model, shown, skipped=options.sinks)
    dense = dense_windows(model, windows)
    perplexity = torch.stack([own.losses.mean() for own in dense]).mean().exp()
    about = f"{options.model} in {options.dtype}, {len(windows)} windows of {options.length} tokens"
    print(f"{about}, dense perplexity {perplexity:.2f}\n")
    heads = ("method", "keys", "values", "recovery", "stored", "factor", "KL", "top-1", "bytes")
    print(f"| {' | '.join(heads)} |{chr(10)}{'|---' * len(heads)}|", flush=True)
    figures = {"table": options.table, "model": options.model, "length": options.length, "windows": len(windows)}
    for row in TABLES[options.table](observed, KVConfig(dtype="bf16", window=options.window, sinks=options.sinks)):
        cells = row.cells()
        if any(
            cells.items() <= other.items() and figures.items() <= other.items() for other in read_rows(options.rows)
        ):
            continue
        found = compare(model, dense, maker(model, row))
        share = share_of_bytes(model, row, options.length)
        print(
            f"| {' | '.join(cells.values())} | {found.factor:.4f} ± {found.error:.4f} | {found.divergences.mean():.5f} "
            f"| {found.same.mean():.2%} | {share:.4f} |",
            flush=True,
        )
        if options.rows:
            with open(options.rows, "a", encoding="utf-8") as file:
                file.write(json.dumps(figures | cells | found.figures() | {"bytes": round(share, 4)}) + "\n")


def read_rows(path: str | None) -> list[dict[str, object]]:
    """Return the rows of a file, none if it does not exist."""
    if path is None or not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@dataclass
class Dense:
    """A window, int64 (tokens,), the losses of its tokens from the second on, and the logits in fp16 without their
    largest: with the dense cache."""

    tokens: Tensor
    losses: Tensor
    logits: Tensor


@dataclass
class Compared:
    """A cache beside the dense one, by windows and predicted tokens, fp64: differences of the loss, divergences of the
    distribution, and 1 where the likeliest token is the same."""

    differences: Tensor
    divergences: Tensor
    same: Tensor

    @property
    def factor(self) -> float:
        """The perplexity divided by the dense one."""
        return float(self.differences.mean().exp())

    @property
    def blocks(self) -> Tensor:
        """The mean difference of each block of tokens."""
        return torch.cat([block.mean(1) for block in self.differences.split(BLOCK, 1)])

    @property
    def error(self) -> float:
        """The standard error of the mean difference."""
        return float(self.blocks.std()) / len(self.blocks) ** 0.5

    def figures(self) -> dict[str, object]:
        """The figures of a row."""
        return {
            "factor": round(self.factor, 4),
            "stderr": round(self.error, 4),
            "kl": round(float(self.divergences.mean()), 5),
            "top1": round(float(self.same.mean()), 4),
            "of_windows": [round(ratio, 5) for ratio in self.differences.mean(1).exp().tolist()],
            "of_blocks": [round(difference, 5) for difference in self.blocks.tolist()],
        }


@torch.inference_mode()
def dense_windows(model: PreTrainedModel, windows: Examples) -> list[Dense]:
    """Return what the model predicts of each window without a cache."""
    found = []
    for tokens in windows["input_ids"]:
        logits = model(input_ids=tokens[None]).logits[0].float()
        losses = F.cross_entropy(logits[:-1], tokens[1:], reduction="none").double()
        found.append(Dense(tokens, losses, (logits - logits.amax(-1, keepdim=True)).half()))
    return found


@torch.inference_mode()
def compare(model: PreTrainedModel, dense: list[Dense], make: Callable[[], PrunedCache]) -> Compared:
    """Compare what the model predicts with a cache with what it predicts of the same windows without one."""
    parts: list[list[Tensor]] = []
    for own in dense:
        first, found = 0, []
        for logits in cached_logits(model, own.tokens[None], make()):
            last = min(first + logits.shape[1], len(own.losses))
            predicted = logits[0, : last - first].float().log_softmax(-1)
            expected = own.logits[first:last].float().log_softmax(-1)
            losses = F.nll_loss(predicted, own.tokens[first + 1 : last + 1], reduction="none").double()
            divergences = F.kl_div(predicted, expected, reduction="none", log_target=True).sum(-1).double()
            same = (predicted.argmax(-1) == expected.argmax(-1)).double()
            found.append(torch.stack((losses - own.losses[first:last], divergences, same)))
            first = last
        parts.append(list(torch.cat(found, 1)))
    return Compared(*map(torch.stack, zip(*parts, strict=True)))


def orders(observed: Observed, config: KVConfig) -> Iterator[Row]:
    """Keys, values and both, in the model's order and in that of `ria`, without and with signs; and int8."""
    methods = {"natural order": Identity(), "ria": RIAPermuter()}
    for keys, values in (("2:4", "dense"), ("dense", "2:4"), ("2:4", "2:4")):
        for name, method in methods.items():
            for recovery in ("zeros", "sign"):
                own = config.replace(keys=keys, values=values, recovery=recovery)
                yield Row(name, own, find_channels(observed, own, method)[0])
    for changes in ({"keys": "1:4", "values": "dense"}, {"keys": "dense", "values": "dense", "dtype": "int8"}):
        own = config.replace(**changes)
        yield Row("ria", own, find_channels(observed, own, RIAPermuter())[0])
    own = config.replace(dtype="int8")
    yield Row("ria", own, find_channels(observed, own, RIAPermuter())[0])


def patterns(observed: Observed, config: KVConfig) -> Iterator[Row]:
    """Keys, and keys and values, in the order of `ria` with signs; both with integers, too.

    The default takes as many bytes as 2:4 with int8 values; "fewer" as many as states of four bits in groups of 32.
    """
    width = width_of(observed)
    wide = str(default_pattern(width))
    fewer, half = (f"{round(share * width)}:{width}" for share in (3 / 8, 1 / 2))
    for keys, values, dtype in (
        ("4bit", "4bit", "int8"),
        (wide, wide, "int8"),
        ("2:4", "2:4", "int8"),
        (fewer, fewer, "int8"),
        ("2:4", "dense", config.dtype),
        ("1:4", "dense", config.dtype),
        ("2:4", "2:4", config.dtype),
        (wide, wide, config.dtype),
        (half, half, config.dtype),
    ):
        own = config.replace(keys=keys, values=values, dtype=dtype)
        yield Row("ria", own, find_channels(observed, own, RIAPermuter())[0])


def width_of(observed: Observed) -> int:
    """Return the number of channels of a head."""
    return next(iter(observed.values())).keys[0].shape[-1]


def rivals(observed: Observed, config: KVConfig) -> Iterator[Row]:
    """Other choices of channels, of keys and values, and ours, at most at the bytes of the default pattern."""
    width = width_of(observed)
    wide = default_pattern(width)
    natural = find_channels(observed, config.replace(keys="2:4", values="2:4"), Identity())[0]
    plain = {
        i: (Channels.natural(*keys.shape), Channels.natural(*values.shape)) for i, (keys, values) in natural.items()
    }
    inverse = {i: (inversed(keys), inversed(values)) for i, (keys, values) in natural.items()}
    for dtype, size in (("int8", 1), ("bf16", 2)):  # bytes of a kept value, and of an amplitude
        code, signs = -(-width // 8), -(-(width - wide.n) // 8)
        budget = wide.n * size + code + signs + size  # without the scale, which all have
        same, most = (f"{bytes_left // size}:{width}" for bytes_left in (budget, budget - code))

        def own(pattern: object, recovery: str, dtype: str = dtype) -> KVConfig:
            return config.replace(keys=str(pattern), values=str(pattern), recovery=recovery, dtype=dtype)

        yield Row("SparK", own(wide, "sign"), inverse, layer=SPARK)
        yield Row("Mustafar", own(most, "zeros"), plain)
        think = own(same, "zeros")
        yield Row("ThinK", think, {i: static(layer, think) for i, layer in observed.items()}, spared=1.0)
        yield Row("natural order", own("2:4", "sign"), natural)
        yield Row("natural order", own("2:4", "zeros"), plain)
        yield Row("ria", own(wide, "sign"), find_channels(observed, own(wide, "sign"), RIAPermuter())[0])


def static(layer: ObservedLayer, config: KVConfig) -> tuple[Channels, Channels]:
    """Channels of which the same are kept for all tokens: those with the most mean squared state, times the query's."""
    found = []
    for states, pattern in zip(layer.states(), (config.keys, config.values), strict=True):
        score = states.square().mean(1)
        if not found:
            score *= layer.query_weights().square()
        kept = score.argsort(1, descending=True).argsort(1) < int(pattern.partition(":")[0])
        natural = Channels.natural(*score.shape)
        found.append(Channels(natural.order, torch.where(kept, 1e15, 1.0), natural.level))
    return found[0], found[1]


def inversed(channels: Channels) -> Channels:
    """Channels whose pruned states are recovered with the same weighted magnitude."""
    return Channels(channels.order, channels.weight, 1 / channels.weight)


def int4(observed: Observed, config: KVConfig) -> Iterator[Row]:
    """States of four bits; and all channels with int8 values."""
    own = config.replace(keys="dense", values="dense")
    channels = find_channels(observed, own, Identity())[0]
    for name, group in (("int4, groups of 32", 32), ("int4, one group", 2**20)):
        form = Ranged(4, group, torch.bfloat16)
        yield Row(name, own, channels, layer=layer_of(form), stored="int4")
    yield Row("int8", own.replace(dtype="int8"), channels)


def quantised(observed: Observed, config: KVConfig) -> Iterator[Row]:
    """Ours in few bits, with bits of each head by a budget of bytes, and the same of every head; the int8 pattern; and
    caches that keep all channels in a few bits."""
    measured, mixed = measure_bits(observed), config.replace(keys="mixed", values="mixed", dtype="int8")
    dense = config.replace(keys="dense", values="dense")
    plain = find_channels(observed, dense, Identity())[0]
    for budget, rivals in BESIDE.items():
        yield Row(f"each head, {budget:g}", mixed, measured.channels(budget), layer=MixedLayer, stored="2 to 6 bits")
        for name in rivals:
            stored, layer = QUANTISED[name]
            yield Row(name, dense, plain, layer=layer, stored=stored)
    pattern = str(default_pattern(width_of(observed)))
    for text, stored in (("4bit", "4 bits"), ("3bit", "3 bits"), (pattern, "int8")):
        own = config.replace(keys=text, values=text, dtype="int8")
        yield Row("ria", own, find_channels(observed, own, RIAPermuter())[0], stored=stored)


BESIDE = {
    0.28: ("q4_0, Hadamard", "q4_1, Hadamard", "KIVI, 4 bits"),
    0.2: ("TurboQuant, 3 bits", "KIVI, 2 bits"),
    0.24: ("TurboQuant, 4 bits", "q4_0"),
}
"""Budgets, and other caches at about as many bytes or more."""

TABLES: dict[str, Callable[[Observed, KVConfig], Iterator[Row]]] = {
    "orders": orders,
    "patterns": patterns,
    "rivals": rivals,
    "int4": int4,
    "quantised": quantised,
}


def maker(model: PreTrainedModel, row: Row, *, exact_window: bool = True) -> Callable[[], PrunedCache]:
    def make() -> PrunedCache:
        cache = PrunedCache(model, row.config, row.channels, exact_window=exact_window)
        for number, channels in row.channels.items():
            cache.layers[number] = row.layer(row.config, *channels, exact_window)
        return cache

    return make


def share_of_bytes(model: PreTrainedModel, row: Row, tokens: int) -> float:
    """The bytes of a cache that was given the states of a prompt in bf16, divided by those of a dense cache."""
    cache, spared = maker(model, row, exact_window=False)(), 0.0
    for number, (keys, values) in row.channels.items():
        layer = cache.layers[number]
        states = [torch.randn(1, *own.shape, tokens).transpose(2, 3).bfloat16() for own in (keys, values)]
        layer.update(*states)
        if row.spared:
            assert isinstance(layer, PackedCacheLayer)
            spared += row.spared / 8 * sum(own.order.numel() for own in (keys, values)) * layer.packed_count(tokens)
    return (cache.nbytes - spared) / cache.dense_nbytes


if __name__ == "__main__":
    main()
