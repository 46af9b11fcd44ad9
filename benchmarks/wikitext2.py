"""WikiText-2 perplexity: that of `permprune evaluate --tasks wikitext2` beside one computed by hand.

By hand is the recipe of the pruning papers (GPTQ, SparseGPT, Wanda) written out with the tokenizer, the model and
nothing of permprune but the reading of the checkpoint: the joined test text as token ids, cut into windows of 2048
whose rest is dropped, the mean cross-entropy of each window's tokens but the first, and the exponential of its mean
over the windows. --joined is that text as others have joined it, so that the join is compared as well.

python benchmarks/wikitext2.py --data DATA --joined wiki.test.joined.txt
"""

import argparse
import math
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from permprune import TaskList, evaluate_tasks, read_model
from permprune.models.processors import tokenizer_of
from permprune.system.progress import track

WINDOW = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="folder with wikitext-2/wiki.test.raw")
    parser.add_argument("--joined", type=Path, required=True, help="file of the joined text")
    parser.add_argument("--windows", type=int, help="the first windows alone")
    options = parser.parse_args()
    began = time.process_time()
    (own,) = evaluate_tasks(options.model, TaskList(("wikitext2",), data=options.data, limit=options.windows))
    print(f"permprune: {own.value:.5f} over {own.count} tokens, {time.process_time() - began:.0f} core-seconds")
    model, processor, _ = read_model(options.model)
    text = options.joined.read_text(encoding="utf-8")
    value = by_hand(model, tokenizer_of(processor), text, options.windows)
    print(f"by hand:   {value:.5f}, {own.value / value - 1:+.1e} of it apart")


@torch.inference_mode()
def by_hand(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, most: int | None) -> float:
    ids = tokenizer(text, return_tensors="pt").input_ids
    windows = ids[0, : ids.shape[1] // WINDOW * WINDOW].view(-1, WINDOW)[:most]
    losses = []
    for window in track(windows, "by hand"):
        logits = model(window[None]).logits[0, :-1].double()
        losses.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
    return math.exp(math.fsum(losses) / len(losses))


if __name__ == "__main__":
    main()
