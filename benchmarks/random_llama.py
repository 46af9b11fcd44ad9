"""Write a LLaMA with random weights, pruned to N:M by magnitude, and its packed forms, for `permprune bench`.

python benchmarks/random_llama.py OUT --dtypes bf16 fp32
permprune bench OUT/packed-bf16 OUT/packed-fp32 --dense OUT/dense --batch 1 --context 128

The default shape has 1.1 billion parameters: that of LLaMA-3.2-1B with a vocabulary of 32,000 and its own head.
"""

import argparse
import copy
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import permprune
from permprune.pattern import Pattern


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    pattern = Pattern.parse(options.pattern)
    layers = [f"model.{name}" for name, layer in model.model.named_modules() if isinstance(layer, torch.nn.Linear)]
    for name in layers:
        weight = model.get_submodule(name).weight
        weight.mul_(pattern.mask(weight.abs()))
    model.save_pretrained(options.out / "dense")
    for dtype in options.dtypes:
        packed = copy.deepcopy(model)
        permprune.pack(packed, dict.fromkeys(layers, pattern), dtype=dtype)
        packed.save_pretrained(options.out / f"packed-{dtype}")
        print(f"{options.out / f'packed-{dtype}'}: {sum(t.nbytes for t in packed.state_dict().values()) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
