"""What weight updates leave of the output error of single layers: a Markdown table.

Each layer is masked by Wanda in its natural order, and updated for the inputs that the dense model gives it. The table
has the output error on the same text after each update, as a share of that of the mask alone, with masks that the
update chooses and with those of Wanda.

python benchmarks/layer_updates.py --calibration c4.jsonl
"""

import argparse
import time
from fnmatch import fnmatch
from pathlib import Path

import torch
from rows import add
from torch import Tensor

from permprune import read_model
from permprune.calibration.moments import InputMoments
from permprune.data.text import load_documents, tokenize
from permprune.examples import Examples
from permprune.models.autocast import autocast
from permprune.models.forward import frozen, padding_of
from permprune.models.layers import prunable_layers
from permprune.models.processors import tokenizer_of
from permprune.pattern import Pattern
from permprune.saliency.wanda import Wanda
from permprune.system.device import compute_device, fast_dtype
from permprune.updates.admm import ADMM
from permprune.updates.base import LayerUpdate
from permprune.updates.sparsegpt import SparseGPT

LAYERS = ["model.layers.0.*_proj", "model.layers.12.*_proj"]
METHODS: dict[str, LayerUpdate] = {"sparsegpt": SparseGPT(), "admm": ADMM()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pattern", default="2:4", type=Pattern.parse)
    parser.add_argument("--calibration", help="text (default: the default text)")
    parser.add_argument("--windows", type=int, default=12, help="windows of 512 tokens")
    parser.add_argument("--layers", nargs="+", default=LAYERS, help="globs of names of layers")
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    options = parser.parse_args()
    model, processor, _ = read_model(options.model)
    documents = load_documents(options.calibration, "calibration")
    examples = Examples.of(tokenize(documents, tokenizer_of(processor), 512, options.windows, 0))
    layers = [
        layer
        for layer in prunable_layers(model, options.pattern)
        if any(fnmatch(layer.name, glob) for glob in options.layers)
    ]
    inputs = InputMoments({layer.name: layer for layer in layers})
    device = compute_device(model)
    with inputs.observe(padding_of(model, examples)), frozen(model), autocast(device, fast_dtype(device)):
        model.base_model(**examples.to(device))
    moments = inputs.result()
    heads = [f"{name}, {masks} masks" for name in METHODS for masks in ("its own", "Wanda's")]
    print("| layer | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|", sep="\n")
    seconds = dict.fromkeys(heads, 0.0)
    for layer in layers:
        weight, own = layer.weight.float(), moments[layer.name]
        mask = options.pattern.mask(Wanda().score(weight, own))
        alone, cells = output_error(weight, weight * mask, own), []
        for head, (method, given) in zip(heads, ((m, k) for m in METHODS.values() for k in (None, mask)), strict=True):
            began = time.process_time()
            found = method.apply(weight, own, torch.arange(weight.shape[1]), options.pattern, given)
            seconds[head] += time.process_time() - began
            cells.append(round(output_error(weight, found, own) / alone, 3))
        print(f"| {layer.name} | " + " | ".join(map(str, cells)) + " |", flush=True)
        cell = {"table": "layer-updates", "model": options.model, "pattern": str(options.pattern), "layer": layer.name}
        add(options.rows, cell, dict(zip(heads, cells, strict=True)))
    print("| core-seconds | " + " | ".join(f"{own:.1f}" for own in seconds.values()) + " |")


def output_error(weight: Tensor, pruned: Tensor, moments: Tensor) -> float:
    lost = weight - pruned
    return float(((lost @ moments) * lost).sum())


if __name__ == "__main__":
    main()
