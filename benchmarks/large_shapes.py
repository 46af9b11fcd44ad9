"""Memory of runs on large models, on a simulated accelerator that counts its bytes: a few blocks of a shape really run.

A LLaMA of the shape with random weights in bf16 is pruned by `permprune.prune_to_folder`, as a run of all of its blocks
would be: offloaded, with one window in a batch and activations that are computed again. Printed are the most bytes of
the device and of the host that each stage takes beside those of its forecast, and the forecast of the whole model on a
GPU, with the time beside that of the same run with everything in the GPU's memory.

The device and the counts are those of the tests. One thread; the process takes the memory of the device, too. Products
and factors of matrices that take more than 1e11 operations are left out: their results are zeros of the same size. An
update makes 2 of its iterations, which all hold the same.

PYTHONPATH=. python benchmarks/large_shapes.py 7b --update none --train none
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from processes import write_model
from rows import Row, add
from transformers import LlamaConfig

import permprune
from permprune.config import PruneConfig
from permprune.engine.measuring import Evaluation
from permprune.forecasts.machine import Machine, Rates

COMPUTED = 1e11
"""The operations of the largest products that are computed."""

WINDOWS = 2
"""Windows of the statistics, of the accept test and of the evaluation."""


@dataclass(frozen=True)
class Shape:
    """The config of a model, and what a run on it may take: a GPU, and bytes of the device and of the host."""

    config: LlamaConfig
    gpu: str
    memory: int
    offload: str


def llama(hidden: int, inner: int, blocks: int, *, heads: int, keys: int, vocabulary: int = 32000) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


SHAPES = {
    "7b": Shape(llama(4096, 11008, 32, heads=32, keys=32), "rtx4090", 22 * 2**30, "host:40GiB"),
    "8b": Shape(llama(4096, 14336, 32, heads=32, keys=8, vocabulary=128256), "rtx4090", 22 * 2**30, "host:40GiB"),
    "70b": Shape(llama(8192, 28672, 80, heads=64, keys=8), "h100", 80 * 2**30, "host:200GiB"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--order", default="none")
    parser.add_argument("--update", default="admm:iterations=2:gradual=1")
    parser.add_argument("--train", default="steps=1")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--offload", default="host")
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        stages = counted(Path(name), options)
        print("| stage | device, MiB | forecast | host, MiB | forecast |\n|---|---|---|---|---|")
        for stage, found in stages.items():
            print(f"| {stage} |", " | ".join(f"{one / 2**20:.0f}" for one in found.values()), "|")
        method = "+".join([options.order, options.update, options.train])
        cell = {"table": "large-counted", "model": options.shape.upper(), "method": method}
        add(options.rows, cell | {"blocks": options.blocks, "offload": options.offload}, figures(stages))
        row = whole(Path(name), SHAPES[options.shape])
        print(f"whole model: {row}")
        add(options.rows, {"table": "large-whole", "model": options.shape.upper()}, row)


def counted(folder: Path, options: argparse.Namespace) -> dict[str, Row]:
    """Prune some blocks; returns the bytes of each stage on the device and on the host, counted and forecast."""
    from tests.counted_run import counted, on_simulated_device
    from tests.simulated_device import SIMULATED

    torch.set_num_threads(1)
    config = LlamaConfig(**{**SHAPES[options.shape].config.to_dict(), "num_hidden_layers": options.blocks})
    write_model(folder / "model", config)
    settings = PruneConfig(
        order=options.order,
        update=options.update,
        train=options.train,
        calibration=str(folder / "calibration.txt"),
        length=options.length,
        samples=options.samples,
        measured=WINDOWS,
        held_out=WINDOWS,
        batch=1,
        recompute=True,
        precision="bf16",
        offload=options.offload,
    )
    evaluation = Evaluation(str(folder / "evaluation.txt"), WINDOWS, options.length)
    unhurried = Rates(1e12, 1e12, 1e12, 1e12)
    machine = Machine("simulated", SIMULATED, torch.bfloat16, memory=80 * 2**30, sheet=unhurried)
    with on_simulated_device(machine):
        forecast = permprune.forecast(str(folder / "model"), settings, windows=WINDOWS)
        with counted(COMPUTED) as stages:
            permprune.prune_to_folder(str(folder / "model"), folder / "out", settings, evaluation=evaluation)
    names = ("device", "device_forecast", "host", "host_forecast")
    return {
        stage: dict(zip(names, (taken[0], told[0], taken[1], told[1]), strict=True))
        for stage, (taken, told) in stages.beside(forecast).items()
    }


def figures(stages: Mapping[str, Row]) -> Row:
    """The stages, the most that any takes, and the least and the largest quotient of count and forecast of a device."""
    peaks = {name: max(stage[name] for stage in stages.values()) for name in next(iter(stages.values()))}
    quotients = [stage["device"] / stage["device_forecast"] for stage in stages.values()]
    return {**peaks, "least": min(quotients), "most": max(quotients), "stages": stages}


def whole(folder: Path, shape: Shape) -> Row:
    """The forecast of a run on the whole model within the limits of its shape, and the minutes without them."""
    shape.config.save_pretrained(folder / "whole")
    given = PruneConfig(effort="minutes")
    limited = given.replace(memory=shape.memory, offload=shape.offload, recompute=True)
    found, free = (permprune.forecast(str(folder / "whole"), one, gpu=shape.gpu) for one in (limited, given))
    minutes = [sum(filter(None, one.seconds.values())) / 60 for one in (found, free)]
    return {
        "gpu": found.machine.name,
        "memory": shape.memory,
        "device": found.device,
        "host": found.host,
        "files": found.peak("disk").bytes("disk"),
        "minutes": minutes[0],
        "in_memory": minutes[1],
    }


if __name__ == "__main__":
    main()
