"""Ways to divide a model among processes: rows of plain tensors, DTensor parameters, and FSDP2.

Gradients of the weights in the blocks of a random LLaMA are computed in one process, and in several with gloo on the
CPU, which run the same batch. Printed are, over those of one process, the peak memory of the largest process and the
processor time of all; and the largest difference of the outputs, and of the gradients relative to their norm.

python benchmarks/tensor_parallel.py --hidden 1024 --inner 2816 --layers 8
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rows import add
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from permprune.models.layers import block_linears
from permprune.models.row_shards import load_rows
from permprune.system import distributed
from permprune.system.memory import peak_memory_mb, release_freed_memory, reset_peak_memory


def rows(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The rows of this process, as permprune holds them."""
    weights = dict(model.named_parameters())
    meta = LlamaForCausalLM._from_config(model.config).to("meta")
    meta.model.rotary_emb = model.model.rotary_emb
    load_rows(meta, lambda name, rows: weights[name].data[rows].clone())
    return meta


def parallelized(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """DTensor parameters."""
    columns = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    plan = {name: ColwiseParallel(output_layouts=Replicate()) for name in columns}
    plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    return model


def fsdp(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Parameters that are whole while their block runs."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.model.layers, model.model.embed_tokens, model.lm_head, model):
        fully_shard(module, mesh=mesh)
    return model


WAYS = {"one process": lambda model: model, "rows": rows, "parallelize_module": parallelized, "fully_shard": fsdp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"hidden": 1024, "inner": 2816, "layers": 8, "vocabulary": 8000, "length": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=[*WAYS])
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    options = parser.parse_args()
    print("| way | peak / one process | processor time | outputs differ by | gradients |\n|---|---|---|---|---|")
    for way in options.ways:
        count = 1 if way == "one process" else options.processes
        with tempfile.TemporaryDirectory() as name:
            multiprocessing.spawn(work, (count, way, name, options), nprocs=count)
            found = [torch.load(f"{name}/{rank}.pt") for rank in range(count)]
        peak, seconds = max(one["peak"] for one in found), sum(one["seconds"] for one in found)
        gradients = {layer: torch.cat([one["gradients"][layer] for one in found]) for layer in found[0]["gradients"]}
        if count == 1:
            alone = peak, seconds, found[0]["logits"], gradients
        changed = float((found[0]["logits"] - alone[2]).abs().max())
        relative = max(float((gradients[name] - own).norm() / own.norm()) for name, own in alone[3].items())
        ratios = peak / alone[0], seconds / alone[1]
        print(f"| {way} | {ratios[0]:.2f} | {ratios[1]:.2f} | {changed:.1e} | {relative:.1e} |", flush=True)
        cell = {"table": "tensor-parallel", "way": way, "processes": count}
        add(options.rows, cell, {"peak": round(peak), "seconds": round(seconds, 2), "gradients": relative})


def work(rank: int, count: int, way: str, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=count)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.inner,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        vocab_size=options.vocabulary,
    )
    ids = torch.randint(options.vocabulary, (2, options.length), generator=torch.Generator().manual_seed(1))
    with distributed.dividing_rows():
        model = WAYS[way](LlamaForCausalLM(config).requires_grad_(False).eval())
        weights = {layer.name: layer.stored.requires_grad_(True) for layer in block_linears(model)}
        release_freed_memory()
        reset_peak_memory()
        for _ in range(2):  # the first step also sets things up
            model.zero_grad()
            started = time.process_time()
            logits = model(ids, use_cache=False).logits
            logits.square().mean().backward()
    seconds = time.process_time() - started
    gradients = {name: local(weight.grad) for name, weight in weights.items()}
    measured = {"peak": peak_memory_mb(), "seconds": seconds, "logits": logits.detach(), "gradients": gradients}
    torch.save(measured, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    """The rows of this process."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


if __name__ == "__main__":
    main()
