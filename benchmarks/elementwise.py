"""Activation functions and RMS norms on the CPU: Transformers' modules beside permprune's kernels, in turns.

python benchmarks/elementwise.py --threads 1
"""

import argparse
import copy
import math
import time

import torch
from torch import nn
from transformers import activations
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from permprune.kernels.elementwise.module import use_native_layers
from permprune.system.memory import keep_activations

LAYERS = {
    "GELU (BERT, ViT, Whisper)": (nn.GELU, 2048, 1536),
    "GELU by tanh (Gemma, SigLIP)": (activations.GELUTanh, 2048, 1536),
    "the same in Python (GPT-2, Phi)": (activations.NewGELUActivation, 2048, 1536),
    "x sigmoid(1.702 x) (CLIP)": (activations.QuickGELUActivation, 1576, 3072),
    "SiLU (LLaMA, Qwen)": (nn.SiLU, 512, 5632),
    "RMS norm, a prompt": (lambda: LlamaRMSNorm(2048), 512, 2048),
    "RMS norm, a token": (lambda: LlamaRMSNorm(2048), 1, 2048),
}
"""How a layer is made, and the rows and channels of its activations."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_activations()
    print("| layer | type | Transformers, us | native, us | ratio |\n|---|---|---|---|---|")
    for name, (make, rows, width) in LAYERS.items():
        for dtype in (torch.float32, torch.bfloat16):
            layer = make().to(dtype)
            native, x = copy.deepcopy(layer), torch.randn(rows, width).to(dtype)
            use_native_layers(native)
            own, ours = compare(layer, native, x, options.turns)
            print(f"| {name} | {str(dtype)[6:]} | {1e6 * own:.1f} | {1e6 * ours:.1f} | {own / ours:.1f} |", flush=True)


@torch.inference_mode()
def compare(layer: nn.Module, native: nn.Module, x: torch.Tensor, turns: int) -> list[float]:
    """Return the seconds of the fastest call of each."""
    best = [math.inf, math.inf]
    for _ in range(turns):
        for place, module in enumerate((layer, native)):
            started = time.perf_counter()
            module(x)
            best[place] = min(best[place], time.perf_counter() - started)
    return best


if __name__ == "__main__":
    main()
