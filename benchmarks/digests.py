"""Digests of what pruning gives on this machine, to show that a change of the code changes no result.

python benchmarks/digests.py > before.txt, change the code, then python benchmarks/digests.py --against before.txt

A line for each run: the digest of the orders, of the losses after each round, and of the pruned weights. Rounding
differs between processors and versions of PyTorch, so that only digests of one machine compare.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import PreTrainedModel

import permprune

METHODS = (
    "none",
    "random",
    "ria",
    "cp:escapes=2",
    "permllm:steps=4",
    "learned-paper:steps=4",
    "reconstruction",
    "newton:rounds=3",
    "newton:rounds=2:train_steps=2",
    "newton:rounds=1:refine=2",
    "learned:rounds=3",
)
REAL = ("smollm2-135m",)
SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama() -> PreTrainedModel:
    shape = {**SHAPE, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=128, **shape))


def gpt2() -> PreTrainedModel:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4))


def bert() -> PreTrainedModel:
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=128, **SHAPE))


def vit() -> PreTrainedModel:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, **SHAPE))


def mixtral() -> PreTrainedModel:
    shape = {**SHAPE, "num_key_value_heads": 2, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=128, **shape))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    family.__name__: family for family in (llama, gpt2, bert, vit, mixtral)
}


def examples(family: str) -> permprune.Examples:
    """Random examples of a family of tiny models."""
    labels = torch.randint(2, (48,))
    if family == "vit":
        return permprune.Examples({"pixel_values": torch.randn(48, 3, 32, 32), "labels": labels})
    ids = torch.randint(128, (48, 16))
    return permprune.Examples({"input_ids": ids, "labels": labels} if family == "bert" else {"input_ids": ids})


def digest(*values: Any) -> str:
    """The first digits of a digest of tensors and of values that have the same `repr` whenever they are equal."""
    total = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        total.update(value if isinstance(value, bytes) else repr(value).encode())
    return total.hexdigest()[:12]


def pruned(name: str, result: permprune.Pruned) -> str:
    """The line of a run."""
    solution = result.solution
    orders = digest(*(part for pair in sorted(solution.orders.items()) for part in pair))
    losses = digest(*((point.round, point.loss, point.kept, point.stage) for point in solution.curve))
    weights = digest(*(part for pair in sorted(result.model.state_dict().items()) for part in pair))
    return f"{name}: orders {orders}, losses {losses}, weights {weights}"


def tiny() -> Iterator[str]:
    """Every method on tiny random models, in both modes, with other masks, types and updates."""
    runs = [
        (family, mode, {"permute": method}) for family in FAMILIES for mode in ("fold", "gather") for method in METHODS
    ]
    others = [{"saliency": name} for name in ("magnitude", "ria", "obs")]
    others += [{"update": name} for name in ("sparsegpt", "admm")]
    others += [{"pattern": "4:8"}, {"pattern": "mixed", "mode": "gather"}, {"precision": "bf16"}, {"recompute": True}]
    runs += [("llama", "fold", {"permute": "newton:rounds=2", **other}) for other in others]
    for family, mode, changes in runs:
        torch.manual_seed(0)
        model, shown = FAMILIES[family]().eval(), examples(family)
        settings = {"mode": mode, "precision": "fp32", **changes}
        name = " ".join([family, *map(str, settings.values())])
        yield pruned(name, permprune.prune(model, examples=shown, **settings))


def real() -> Iterator[str]:
    """Two rounds of both end-to-end searches on real language models, calibrated on the default text."""
    for name in REAL:
        for method in ("newton:rounds=2", "learned:rounds=2"):
            model, tokenizer, _ = permprune.read_model(name)
            settings = {"mode": "fold" if name == REAL[0] else "gather", "length": 128, "samples": 48}
            yield pruned(f"{name} {method}", permprune.prune(model, tokenizer, permute=method, **settings))


def main(
    models: Annotated[str, typer.Option(help="tiny, real, or all")] = "tiny",
    against: Annotated[Path | None, typer.Option(help="the output of an earlier run")] = None,
) -> None:
    """Print the digests; with --against, only those that differ, and exit with status 1 if there are any."""
    before = set(against.read_text(encoding="utf-8").splitlines()) if against else set()
    differing = 0
    for source in {"tiny": [tiny], "real": [real], "all": [tiny, real]}[models]:
        for line in source():
            if line not in before:
                print(line, flush=True)
                differing += 1
    if against:
        print(f"{differing} differ", file=sys.stderr)
        raise typer.Exit(bool(differing))


if __name__ == "__main__":
    typer.run(main)
