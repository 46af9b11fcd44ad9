"""Decoding speed with a pruned key/value cache and with a dense one: a Markdown table.

The caches hold random states, so that long contexts need no prompt. Each row is the shortest time per token of a few
turns, in which all caches are measured one after the other. The dense cache is Transformers' `DynamicCache` with each
attention and data type given; "speed-up" is against the fastest of them. "MB" are the bytes of the caches' tensors, and
"resident MB" is by how much the resident memory of the process is larger with the filled cache than before it was made,
without memory that is free.

python benchmarks/kv_speed.py --batch 8 --context 8192
"""

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import psutil
import torch
from rows import add
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from permprune.checkpoints.io import read_model
from permprune.kv.cache import PrunedCache
from permprune.kv.config import AUTO, KVConfig, default_pattern
from permprune.models.forward import cache_argument
from permprune.system.memory import release_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Row:
    """A cache to measure, the memory that it takes, its model, and the attention that the model is set to."""

    name: str
    model: PreTrainedModel
    attention: str
    cache: Cache
    resident: int
    seconds: float = float("inf")

    def nbytes(self) -> int:
        """Bytes of the states of tokens."""
        if isinstance(self.cache, PrunedCache):
            return self.cache.nbytes
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--dense", default="sdpa:bf16,sdpa:fp32,eager:bf16,eager:fp32", help="attention:type, ...")
    parser.add_argument("--pruned", default="bf16:auto,bf16:int8", help="type of the model:type of kept values, ...")
    parser.add_argument("--patterns", nargs="+", default=[AUTO], help="patterns of the pruned caches")
    parser.add_argument("--kv", type=Path, nargs="*", default=[], help="folders that permprune kv wrote, measured too")
    parser.add_argument("--steps", type=int, default=4, help="tokens in each turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which no further turn begins")
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    options = parser.parse_args()
    model, _, _ = read_model(options.model)
    models: dict[str, PreTrainedModel] = {}

    def model_of(dtype: str) -> PreTrainedModel:
        if dtype not in models:
            own = read_model(options.model)[0] if models else model
            models[dtype] = own.to(DTYPES[dtype]).eval()
        return models[dtype]

    def made(make: Callable[[], Cache], own: PreTrainedModel) -> tuple[Cache, int]:
        before = resident()
        cache = filled(make(), own, options.batch, options.context)
        return cache, resident() - before

    rows: list[Row] = []
    dense: dict[str, tuple[Cache, int]] = {}
    for text in filter(None, options.dense.split(",")):
        attention, dtype = text.split(":")
        own = model_of(dtype)
        if dtype not in dense:
            dense[dtype] = made(partial(DynamicCache, config=own.config), own)
        rows.append(Row(f"dense, {attention}, {dtype}", own, attention, *dense[dtype]))
    pruned = list(filter(None, options.pruned.split(",")))
    for text, pattern in product(pruned, [*options.patterns, *options.kv]):
        dtype, stored = text.split(":")
        own = model_of(dtype)
        if isinstance(pattern, Path):
            make = partial(PrunedCache.from_pretrained, pattern, own)
            name = f"bits of each head, model {dtype}"
        else:
            config = KVConfig(pattern, pattern, dtype=stored)
            make = partial(PrunedCache, own, config)
            shown = str(default_pattern(width_of(own))) if pattern == AUTO else pattern
            name = f"{shown}, {stored if stored != 'auto' else dtype}, model {dtype}"
        filled(make(), own, 1, 64)  # what the first call loads is not counted
        cache, grown = made(make, own)
        rows.append(Row(name, own, "permprune", cache, grown))
    began = time.perf_counter()
    for turn in range(options.turns):
        if turn and time.perf_counter() - began > options.limit:
            break
        for row in rows:
            row.seconds = min(row.seconds, seconds_per_token(row, options.batch, options.steps))
    fastest = min(row.seconds for row in rows if "dense" in row.name)
    print(f"{options.model}, batch {options.batch}, {options.context} tokens, {torch.get_num_threads()} threads\n")
    print("| cache | MB | resident MB | ms per step | tokens/s | speed-up |\n|---|---|---|---|---|---|")
    for row in rows:
        speed = f"{1000 * row.seconds:.1f} | {options.batch / row.seconds:.1f} | {fastest / row.seconds:.2f}"
        print(f"| {row.name} | {row.nbytes() / 1e6:.0f} | {row.resident / 1e6:.0f} | {speed} |")
        shape = {name: getattr(options, name) for name in ("model", "batch", "context")}
        cell = {"table": "decode", "threads": torch.get_num_threads(), "cache": row.name} | shape
        add(options.rows, cell, {"ms": 1000 * row.seconds, "bytes": row.nbytes(), "resident": row.resident})


def resident() -> int:
    """Return the resident memory of this process in bytes, after free memory went back to the system."""
    gc.collect()
    release_freed_memory()
    return int(psutil.Process().memory_info().rss)


@torch.inference_mode()
def filled(cache: Cache, model: PreTrainedModel, batch: int, context: int) -> Cache:
    """Add random states of `context` tokens."""
    states = torch.randn(2, batch, model.config.num_key_value_heads, context, width_of(model)).to(model.dtype)
    for layer in cache.layers:
        layer.update(states[0], states[1])
    return cache


def width_of(model: PreTrainedModel) -> int:
    """Return the number of channels of a head."""
    config = model.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@torch.inference_mode()
def seconds_per_token(row: Row, batch: int, steps: int) -> float:
    """Decode one token to adapt, and measure the mean time of `steps` more."""
    if row.model.config._attn_implementation != row.attention:
        row.model.set_attn_implementation(row.attention)
    step: Callable[[], object] = lambda: row.model(  # noqa: E731
        torch.full((batch, 1), 17), **cache_argument(row.model, row.cache)
    )
    step()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - began) / steps


if __name__ == "__main__":
    main()
