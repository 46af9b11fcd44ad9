"""Retrieval with a pruned key/value cache: a Markdown table of accuracies.

A context of text holds two sentences at random places: a pass key of five digits (Mohtashami and Jaggi 2023, arXiv
2305.16300), and a needle, the magic word of a city. Then the model is asked for each. An answer counts if every token
of it is the most likely one. The context is read once, and its keys and values are given to every cache, dense or
pruned, so that all read the same states; the question comes after it, and reads the packed form. All is drawn from the
seed.

python benchmarks/kv_retrieval.py --kv kv/ --data wiki.test.raw --lengths 2048 4096 --count 50 20
"""

import argparse
import copy
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from permprune.checkpoints.io import read_model
from permprune.data.load import load_examples
from permprune.inference.kv.attention import use_attention
from permprune.inference.kv.cache import PrunedCache
from permprune.inference.kv.config import KVConfig
from permprune.models.forward import cache_argument
from permprune.models.processors import tokenizer_of

CITIES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Moscow", "Tokyo", "Chicago", "Boston")
WORDS = ("apple", "river", "mountain", "silver", "window", "garden", "winter", "bridge", "candle", "forest", "ocean")
TASKS = ("pass key", "needle")
Make = Callable[[], Cache]


@dataclass
class Example:
    """A context, int64 (tokens,), and a question and its answer for each task."""

    context: Tensor
    questions: list[tuple[Tensor, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kv", required=True, help="folder that permprune kv wrote")
    parser.add_argument("--data", help="the text around; the default text if absent")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096], help="tokens of the contexts")
    parser.add_argument("--count", type=int, nargs="+", default=[50, 20], help="contexts of each length")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, processor, _ = read_model(options.model)
    model = model.bfloat16().eval()
    use_attention(model)
    tokenizer = tokenizer_of(processor)
    makers: dict[str, Make] = {"dense": partial(DynamicCache, config=model.config)}
    for name, changes in (
        ("2:4", {}),
        ("2:4, int8", {"dtype": "int8"}),
        ("2:4, zeros", {"recovery": "zeros"}),
    ):
        makers[name] = partial(PrunedCache.from_pretrained, options.kv, model, **changes)
    makers["2:4, zeros, the model's order"] = partial(PrunedCache, model, KVConfig(recovery="zeros"))
    print("| tokens | contexts | cache | " + " | ".join(TASKS) + " |\n|---|---|---|---|---|", flush=True)
    for length, count in zip(options.lengths, options.count, strict=True):
        text = load_examples(options.data, model, processor, part="evaluation", count=count, length=length)["input_ids"]
        draw = random.Random(f"{options.seed} {length}")
        right = {name: [0] * len(TASKS) for name in makers}
        for done, row in enumerate(text, 1):
            found = answers(model, makers, example(tokenizer, row, draw))
            for name, correct in found.items():
                right[name] = [total + one for total, one in zip(right[name], correct, strict=True)]
            if done % 10 == 0:
                print(f"{length} tokens, {done} contexts: {right}", file=sys.stderr, flush=True)
        for name, totals in right.items():
            shares = " | ".join(f"{100 * total / len(text):.0f} %" for total in totals)
            print(f"| {length} | {len(text)} | {name} | {shares} |", flush=True)


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
def answers(model: PreTrainedModel, makers: dict[str, Make], own: Example) -> dict[str, list[bool]]:
    """Return for each cache whether each question is answered."""
    read = DynamicCache(config=model.config)
    model(own.context[None], logits_to_keep=1, **cache_argument(model, read))
    found = {}
    for name, make in makers.items():
        filled, found[name] = make(), []
        for layer, states in zip(filled.layers, read.layers, strict=True):
            layer.update(states.keys, states.values)
        for question, answer in own.questions:
            cache = copy.deepcopy(filled)
            asked = torch.cat((question, answer))[None, :-1]
            logits = model(asked, **cache_argument(model, cache)).logits[0, -len(answer) :]
            found[name].append(torch.equal(logits.argmax(-1), answer))
    return found


if __name__ == "__main__":
    main()
