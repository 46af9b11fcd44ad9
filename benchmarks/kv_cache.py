"""Perplexity and bytes of pruned key/value caches: a Markdown table.

Every token is pruned but those of the window and the sinks, in prompts too. "factor" is the perplexity divided by that
with a dense cache, with the standard error of the paired difference over the windows. The bytes are those of the
storages of a cache that holds one window of states in bf16, divided by those of a dense bf16 cache. Orders are found on
the calibration text.

`--table orders` compares keys and values, orders and recoveries; `patterns` has keys alone, and keys and values, in
the order of `ria` only; `rivals` other choices of channels at equal bytes, by their descriptions: ThinK (arXiv
2407.21018), which keeps the same channels of all tokens and so needs no mask; Mustafar (2505.22913), which keeps the
largest channels of each token; SparK (2508.15212), which weights them by the queries and recovers the others from
their signs. `int4` is our own reference of a cache with 4 bits for each state and two bf16 numbers for each group of
channels of a token and head (Transformers' `QuantizedCache` needs quanto or hqq).

python benchmarks/kv_cache.py --data wiki.test.raw --calibration wiki.valid.raw --windows 4 --length 1024
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permprune.checkpoints.io import read_model
from permprune.data.load import load_examples
from permprune.evaluation.perplexity import perplexity
from permprune.evaluation.result import Result
from permprune.examples import Examples
from permprune.jobs.kv import find_channels
from permprune.kv.cache import PrunedCache
from permprune.kv.calibration import ObservedLayer, observe_states
from permprune.kv.config import DTYPES, KVConfig, default_pattern
from permprune.kv.evaluation import cached_perplexity
from permprune.kv.files import LayerChannels
from permprune.kv.layer import PrunedLayer
from permprune.kv.packing import TINY, Channels, Parts, encode
from permprune.kv.tokens import PackedTokens
from permprune.permuters.identity import Identity
from permprune.permuters.ria import RIAPermuter

Observed = Mapping[int, ObservedLayer]


@dataclass
class Row:
    """A row of the table: a method, its settings, channels and layers, and the bits a channel that it does not need."""

    method: str
    config: KVConfig
    channels: LayerChannels
    spared: float = 0.0
    layer: type[PrunedLayer] = PrunedLayer

    def cells(self) -> dict[str, str]:
        config = self.config
        return {
            "method": self.method,
            "keys": config.keys,
            "values": config.values,
            "recovery": config.recovery,
            "stored": config.dtype,
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
    model = model.to(DTYPES[options.dtype])
    shown = load_examples(
        options.calibration, model, tokenizer, part="calibration", count=options.samples, length=512, seed=0
    )
    windows = load_examples(
        options.data, model, tokenizer, part="evaluation", count=options.windows, length=options.length
    )
    observed = observe_states(model, shown, skipped=options.sinks)
    dense = log_perplexities(windows, lambda window: perplexity(model, window, 1))
    about = f"{options.model} in {options.dtype}, {len(windows)} windows of {options.length} tokens"
    print(f"{about}, dense perplexity {dense.mean().exp():.2f}\n")
    print("| method | keys | values | recovery | stored | factor | bytes |\n|---|---|---|---|---|---|---|", flush=True)
    figures = {"table": options.table, "model": options.model, "length": options.length, "windows": len(windows)}
    for row in TABLES[options.table](observed, KVConfig(dtype="bf16", window=options.window, sinks=options.sinks)):
        cells = row.cells()
        if any(
            cells.items() <= other.items() and figures.items() <= other.items() for other in read_rows(options.rows)
        ):
            continue
        make = maker(model, row)
        ratios = log_perplexities(windows, lambda window: cached_perplexity(model, window, make, 1).result) - dense  # noqa: B023
        factor, error = float(ratios.mean().exp()), float(ratios.std()) / len(ratios) ** 0.5
        share = share_of_bytes(model, row, options.length)
        print(f"| {' | '.join(cells.values())} | {factor:.4f} ± {error:.4f} | {share:.4f} |", flush=True)
        if options.rows:
            measured = {"factor": round(factor, 4), "stderr": round(error, 4), "bytes": round(share, 4)}
            measured["of_windows"] = [round(ratio, 5) for ratio in ratios.exp().tolist()]
            with open(options.rows, "a", encoding="utf-8") as file:
                file.write(json.dumps(figures | cells | measured) + "\n")


def read_rows(path: str | None) -> list[dict[str, object]]:
    """Return the rows of a file, none if it does not exist."""
    if path is None or not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def log_perplexities(windows: Examples, measure: Callable[[Examples], Result]) -> Tensor:
    """Return the logarithm of the perplexity of each window, fp64 (windows,)."""
    values = [measure(windows[at : at + 1]).value for at in range(len(windows))]
    return torch.tensor(values, dtype=torch.float64).log()


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

    The default takes as many bytes as 2:4 with int8 values; the default pattern of int5, and "fewer", as many as states
    of four bits.
    """
    width = width_of(observed)
    most, wide = (str(default_pattern(width, dtype)) for dtype in ("int5", "int8"))
    fewer, half = (f"{round(share * width)}:{width}" for share in (3 / 8, 1 / 2))
    for keys, values, dtype in (
        (most, most, "int5"),
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

        yield Row("SparK", own(wide, "sign"), inverse, layer=SparKLayer)
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
    yield Row("int4, groups of 32", own, channels, layer=Int4Layer)
    yield Row("int4, one group", own, channels, layer=WideInt4Layer)
    yield Row("int8", own.replace(dtype="int8"), channels)


class OtherLayer(PrunedLayer):
    """A layer with other packed tokens."""

    tokens: type[PackedTokens]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        assert self.packed is not None
        keys, values = (self.tokens(own.channels, own.layout) for own in self.packed)
        self.packed = keys, values


class SparKTokens(PackedTokens):
    """Tokens that keep the largest weighted channels, however the others are recovered."""

    def append(self, states: Tensor) -> None:
        self._write(encode(states, self.channels, self.layout, turns=0), states.shape[2])


class SparKLayer(OtherLayer):
    tokens = SparKTokens


class Int4Tokens(PackedTokens):
    """States as integers from 0 to 15, two in a byte, with the least state and the step of each group of channels."""

    group = 32

    def append(self, states: Tensor) -> None:
        groups = states.float().unflatten(-1, (-1, min(self.group, states.shape[-1])))
        low = groups.amin(-1, keepdim=True).bfloat16()
        step = ((groups.amax(-1, keepdim=True) - low.float()) / 15).bfloat16()
        steps = ((groups - low.float()) / step.float().clamp_min(TINY)).round().clamp(0, 15).byte().flatten(-2)
        parts: Parts = {"values": steps[..., ::2] | steps[..., 1::2] << 4, "low": low, "step": step}
        self._write(parts, states.shape[2])

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        values, low, step = (self.parts[name][:, :, start:stop] for name in ("values", "low", "step"))
        steps = torch.stack((values & 15, values >> 4), -1).flatten(-2).unflatten(-1, (low.shape[-2], -1))
        return (steps * step.float() + low.float()).flatten(-2).to(dtype)

    def native_states(self) -> None:
        return None


class WideInt4Tokens(Int4Tokens):
    group = 2**20


class Int4Layer(OtherLayer):
    tokens = Int4Tokens


class WideInt4Layer(OtherLayer):
    tokens = WideInt4Tokens


TABLES: dict[str, Callable[[Observed, KVConfig], Iterator[Row]]] = {
    "orders": orders,
    "patterns": patterns,
    "rivals": rivals,
    "int4": int4,
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
        assert isinstance(layer, PrunedLayer)
        states = [torch.randn(1, *own.shape, tokens).transpose(2, 3).bfloat16() for own in (keys, values)]
        layer.update(*states)
        spared += row.spared / 8 * sum(own.order.numel() for own in (keys, values)) * layer.packed_count(tokens)
    return (cache.nbytes - spared) / cache.dense_nbytes


if __name__ == "__main__":
    main()
