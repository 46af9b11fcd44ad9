"""Retrieval with a pruned key/value cache: a Markdown table of accuracies.

A context of text holds two sentences at random places: a pass key of five digits (Mohtashami and Jaggi 2023, arXiv
2305.16300), and a needle, the magic word of a city. Then the model is asked for each. An answer counts if every token
of it is the most likely one. The context is read once, and its keys and values are given to every cache, dense or
pruned, so that all read the same states; the question comes after it, and reads the packed form. All is drawn from the
seed.

The difference to the dense cache, in points, is over the same questions, with the standard error of the mean of the
paired differences. The caches are those of `kv_cache.py` of the same `--table`.

python benchmarks/kv_retrieval.py --data wiki.test.raw --calibration wiki.valid.raw --lengths 2048 4096 --count 50 50
"""

import argparse
import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from kv_cache import TABLES, maker
from rows import add
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from permprune.checkpoints.io import read_model
from permprune.data.load import load_examples
from permprune.kv.attention import use_attention
from permprune.kv.calibration import observe_states
from permprune.kv.config import KVConfig
from permprune.models.forward import cache_argument
from permprune.models.processors import Processor, tokenizer_of
from permprune.system.device import dtype_named

CITIES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Moscow", "Tokyo", "Chicago", "Boston")
WORDS = ("apple", "river", "mountain", "silver", "window", "garden", "winter", "bridge", "candle", "forest", "ocean")
TASKS = ("pass key", "needle")
DENSE = ("dense", "", "", "bf16")
Make = Callable[[], Cache]
Name = tuple[str, str, str, str]
"""A cache: the method, the patterns of its keys and values, and what is stored."""


@dataclass
class Answer:
    """Whether an answer is right, and its log-probability."""

    right: bool
    log_probability: float


@dataclass
class Example:
    """A context, int64 (tokens,), and a question and its answer for each task."""

    context: Tensor
    questions: list[tuple[Tensor, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="type in which the model computes")
    parser.add_argument("--table", choices=TABLES, default="quantised")
    parser.add_argument(
        "--only", help="the caches whose method has this in its name, beside the dense one; all if absent"
    )
    parser.add_argument("--data", help="the text around; the default text if absent")
    parser.add_argument("--calibration", help="text to find the channels on; the default text if absent")
    parser.add_argument("--samples", type=int, default=16, help="windows of calibration text, 512 tokens each")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096], help="tokens of the contexts")
    parser.add_argument("--count", type=int, nargs="+", default=[50, 50], help="contexts of each length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    parser.add_argument("--states", help="folder for the states of the contexts, which later runs read from there")
    options = parser.parse_args()
    model, processor, _ = read_model(options.model)
    model = model.to(dtype_named(options.dtype)).eval()
    makers = makers_of(model, processor, options)
    use_attention(model)
    tokenizer = tokenizer_of(processor)
    titles = " | ".join(f"{task} | difference" for task in TASKS)
    print(f"| tokens | contexts | method | keys | values | stored | {titles} |\n{'|---' * 10}|", flush=True)
    for length, count in zip(options.lengths, options.count, strict=True):
        text = load_examples(options.data, model, processor, part="evaluation", count=count, length=length)["input_ids"]
        draw = random.Random(f"{options.seed} {length}")
        found: dict[Name, list[list[Answer]]] = {name: [] for name in makers}
        for number, row in enumerate(text):
            own_example = example(tokenizer, row, draw)
            path = Path(options.states) / f"{length}_{number}.pt" if options.states else None
            states = read_context(model, own_example.context, path)
            for name, own in answers(model, makers, own_example, states).items():
                found[name].append(own)
        right = {name: torch.tensor([[task.right for task in row] for row in rows]) for name, rows in found.items()}
        for name, own in right.items():
            shares, differences = compared(own, right[DENSE])
            cells = [
                f"{100 * shares[task]:.0f} % | {mean:+.0f} ± {error:.1f}" for task, (mean, error) in differences.items()
            ]
            print(f"| {length} | {len(text)} | {' | '.join(name + tuple(cells))} |", flush=True)
            cell = {"table": "retrieval", "model": options.model, "tokens": length, "contexts": len(text)}
            cell |= dict(zip(("method", "keys", "values", "stored"), name, strict=True))
            add(options.rows, cell, {"accuracy": shares, "difference": differences if name != DENSE else None})


def makers_of(model: PreTrainedModel, processor: Processor, options: argparse.Namespace) -> dict[Name, Make]:
    """Return functions that make empty caches: dense, and of every row of the table."""
    shown = load_examples(
        options.calibration, model, processor, part="calibration", count=options.samples, length=512, seed=0
    )
    config = KVConfig(dtype="bf16")
    observed = observe_states(model, shown, skipped=config.sinks)
    makers: dict[Name, Make] = {DENSE: partial(DynamicCache, config=model.config)}
    for row in TABLES[options.table](observed, config):
        method, keys, values, _, stored = row.cells().values()
        if options.only and options.only not in method:
            continue
        makers[method, keys, values, stored] = maker(model, row, exact_window=False)
    return makers


def compared(right: Tensor, dense: Tensor) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Return the accuracy in each task, and its difference to that of the dense cache in points with its error.

    Both are bool (contexts, tasks).
    """
    differences = 100 * (right.double() - dense.double())
    errors = (differences.std(0) / len(differences) ** 0.5).tolist()
    pairs = zip(differences.mean(0).tolist(), errors, strict=True)
    return dict(zip(TASKS, right.double().mean(0).tolist(), strict=True)), dict(zip(TASKS, pairs, strict=True))


def example(tokenizer: PreTrainedTokenizerBase, text: Tensor, draw: random.Random) -> Example:
    """Hide a pass key and a needle in text, and shorten it to its length."""
    key, city, word = draw.randrange(10000, 100000), draw.choice(CITIES), draw.choice(WORDS)

    def tokens(words: str) -> Tensor:
        return torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"])

    hidden = [
        tokens(f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"),
        tokens(f"\n\nThe magic word of {city} is {word}. Remember it. {word} is the magic word of {city}.\n\n"),
    ]
    draw.shuffle(hidden)
    left = len(text) - sum(map(len, hidden))
    first, second = sorted(draw.randrange(left) for _ in hidden)
    context = torch.cat((text[:first], hidden[0], text[first:second], hidden[1], text[second:left]))
    questions = [
        (tokens("\n\nWhat is the pass key? The pass key is"), tokens(f" {key}")),
        (tokens(f"\n\nWhat is the magic word of {city}? The magic word of {city} is"), tokens(f" {word}")),
    ]
    return Example(context, questions)


@torch.inference_mode()
def read_context(model: PreTrainedModel, context: Tensor, path: Path | None) -> list[Tensor]:
    """Return the keys and values of a context, (2, batch, heads, tokens, width) for each layer.

    They are read from `path` if it exists; otherwise the model reads the context, and they are written to `path`.
    """
    if path is not None and path.exists():
        return list(torch.load(path))
    read = DynamicCache(config=model.config)
    model(context[None], logits_to_keep=1, **cache_argument(model, read))
    states = [torch.stack((layer.keys, layer.values)) for layer in read.layers]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(states, path)
    return states


@torch.inference_mode()
def answers(
    model: PreTrainedModel, makers: dict[Name, Make], own: Example, states: list[Tensor]
) -> dict[Name, list[Answer]]:
    """Return the answers that the model gives with each cache, which is filled with the states of the context."""
    found = {}
    for name, make in makers.items():
        filled, found[name] = make(), []
        for layer, (keys, values) in zip(filled.layers, states, strict=True):
            layer.update(keys, values)
        for question, answer in own.questions:
            cache = copy.deepcopy(filled)
            asked = torch.cat((question, answer))[None, :-1]
            logits = model(asked, **cache_argument(model, cache)).logits[0, -len(answer) :].float()
            probability = float(logits.log_softmax(-1).gather(1, answer[:, None]).sum())
            found[name].append(Answer(torch.equal(logits.argmax(-1), answer), probability))
    return found


if __name__ == "__main__":
    main()
