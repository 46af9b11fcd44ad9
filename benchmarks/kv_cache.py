"""Perplexity and bytes of pruned key/value caches: a Markdown table.

Every token is pruned but those of the window and the sinks, in prompts too. "factor" is the perplexity divided by that
with a dense cache. The bytes are those of the storages of a cache that holds one window of states in bf16, divided by
those of a dense bf16 cache. Orders are found on the calibration text.

python benchmarks/kv_cache.py --data wiki.test.raw --calibration wiki.valid.raw --windows 4 --length 1024
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

from permprune.checkpoints.io import read_model
from permprune.data.load import load_examples
from permprune.evaluation.perplexity import perplexity
from permprune.inference.kv.cache import PrunedCache
from permprune.inference.kv.calibration import observe_states
from permprune.inference.kv.config import KVConfig
from permprune.inference.kv.evaluation import cached_perplexity
from permprune.inference.kv.files import LayerChannels
from permprune.inference.kv.layer import PrunedLayer
from permprune.jobs.kv import find_channels
from permprune.permuters.base import ScorePermuter
from permprune.permuters.identity import Identity
from permprune.permuters.ria import RIAPermuter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", help="text to evaluate on; the default text if absent")
    parser.add_argument("--calibration", help="text to find the orders on; the default text if absent")
    parser.add_argument("--samples", type=int, default=16, help="windows of calibration text, 512 tokens each")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--window", type=int, default=KVConfig.window)
    parser.add_argument("--sinks", type=int, default=KVConfig.sinks)
    options = parser.parse_args()
    model, tokenizer, _ = read_model(options.model)
    shown = load_examples(
        options.calibration, model, tokenizer, part="calibration", count=options.samples, length=512, seed=0
    )
    windows = load_examples(
        options.data, model, tokenizer, part="evaluation", count=options.windows, length=options.length
    )
    observed = observe_states(model, shown, skipped=options.sinks)
    dense = perplexity(model, windows, 1).value
    print(f"{options.model}, {len(windows)} windows of {options.length} tokens, dense perplexity {dense:.2f}\n")
    print("| keys | values | order | recovery | stored | factor | bytes |\n|---|---|---|---|---|---|---|", flush=True)
    for config, method in caches(options.window, options.sinks):
        channels, _ = find_channels(observed, config, method)
        found = cached_perplexity(model, windows, maker(model, config, channels), 1)
        order = "natural" if isinstance(method, Identity) else method.name
        print(
            f"| {config.keys} | {config.values} | {order} | {config.recovery} | {config.dtype} | "
            f"{found.result.value / dense:.4f} | {share_of_bytes(model, config, channels, options.length):.4f} |",
            flush=True,
        )


def caches(window: int, sinks: int) -> Iterator[tuple[KVConfig, ScorePermuter]]:
    """The settings that are compared, each with the order of its channels."""
    common = {"window": window, "sinks": sinks}
    for keys, values in (("2:4", "dense"), ("dense", "2:4"), ("2:4", "2:4")):
        for method in (Identity(), RIAPermuter()):
            for recovery in ("zeros", "sign"):
                yield KVConfig(keys, values, recovery=recovery, dtype="bf16", **common), method
    yield KVConfig("1:4", "dense", dtype="bf16", **common), RIAPermuter()
    yield KVConfig("dense", "dense", dtype="int8", **common), Identity()
    yield KVConfig("2:4", "2:4", dtype="int8", **common), RIAPermuter()


def maker(model: PreTrainedModel, config: KVConfig, channels: LayerChannels) -> Callable[[], PrunedCache]:
    return lambda: PrunedCache(model, config, channels, exact_window=True)


def share_of_bytes(model: PreTrainedModel, config: KVConfig, channels: LayerChannels, tokens: int) -> float:
    """The bytes of a cache that was given the states of a prompt in bf16, divided by those of a dense cache."""
    cache = PrunedCache(model, config, channels)
    for number, (keys, values) in channels.items():
        layer = cache.layers[number]
        assert isinstance(layer, PrunedLayer)
        states = [torch.randn(1, own.shape[0], tokens, own.shape[1]).bfloat16() for own in (keys, values)]
        layer.update(*states)
    return cache.nbytes / cache.dense_nbytes


if __name__ == "__main__":
    main()
