"""What permprune does on a GPU, in one command of at most nine minutes: gpu.json, and the same as a page, gpu.md.

Each stage runs in a process of its own, with a share of the time. A stage that fails or takes too long is reported as
that, and the others run all the same.

* tests: those of the Triton kernels, which run on the GPU where there is one
* products: a linear layer, packed 2:4 in each type, beside dense bf16, PyTorch's own 2:4 (`to_sparse_semi_structured`)
  and torchao's FP8 with 2:4 where it is installed, for decoding (1 and 16 rows) and for many rows
* cache: attention of one token over packed keys and values, beside PyTorch's attention over dense ones
* placement: the costs of moving channels, beside the same in PyTorch
* demo: SmolLM2-135M searched, trained, packed and verified, with the most memory of the device beside the forecast

python benchmarks/gpu.py --out gpu
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rows import add
from torch import Tensor, nn

from permprune.checkpoints.record import SIDES
from permprune.config import PruneConfig
from permprune.engine.measuring import Evaluation
from permprune.forecasts.forecast import Forecast
from permprune.jobs.prune import prune_to_folder
from permprune.jobs.verify import verify
from permprune.kernels.library import runs_triton
from permprune.kernels.product.module import PackedLinear
from permprune.kernels.product.packed import PackedWeight
from permprune.kernels.search.placement import place_reference
from permprune.kv.attention import attention
from permprune.kv.config import KVConfig
from permprune.kv.layer import PackedCacheLayer
from permprune.pattern import Pattern
from permprune.system.device import INT4

Row = dict[str, Any]
Call = Callable[[], object]

TIMES = {"tests": 150, "products": 90, "cache": 60, "placement": 40, "demo": 200}
"""The most seconds of each stage."""

TURNS, CALLS = 5, 10
"""Every alternative is timed so many times, in turns; the fastest time of so many calls counts."""

SHAPES = {"large": ((4096, 4096), (14336, 4096)), "small": ((64, 128),)}
"""Rows and channels of the layers, by size."""

KEYS = {"large": ((1, 8192), (8, 8192)), "small": ((2, 256),)}
"""Sequences and tokens of the caches."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=TIMES, default=list(TIMES))
    parser.add_argument("--size", choices=SHAPES, default="large", help="small shapes try the command")
    parser.add_argument("--model", default="smollm2-135m", help="the model of the demo")
    parser.add_argument("--stage", choices=TIMES, help=argparse.SUPPRESS)  # run in this process
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage:
        for row in STAGES[options.stage](options):
            print(json.dumps(row), flush=True)
            add(options.out / "gpu.json", {"stage": options.stage} | identity(row), row)
        return
    failed = [stage for stage in options.only if not succeeded(stage, options)]
    write_page(options.out)
    print(f"results: {options.out / 'gpu.md'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(bool(failed))


def succeeded(stage: str, options: argparse.Namespace) -> bool:
    """Run a stage in a process of its own; whether it ended well and in time. If not, a row says why."""
    command = [sys.executable, __file__, "--stage", stage, "--out", str(options.out), "--device", options.device]
    began = time.monotonic()
    print(f"{stage} ...", flush=True)
    try:
        ended = subprocess.run(
            [*command, "--size", options.size, "--model", options.model],
            timeout=TIMES[stage],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        shown, failure = ended.stdout, "failed" if ended.returncode else None
    except subprocess.TimeoutExpired as error:
        shown, failure = str(error.output or b"", "utf-8"), f"not done in {TIMES[stage]} s"
    (options.out / f"{stage}.log").write_text(shown, encoding="utf-8")
    seconds = round(time.monotonic() - began, 1)
    cell: Row = {"stage": stage, "name": "whole stage"}
    add(options.out / "gpu.json", cell, {"seconds": seconds} | ({"error": failure} if failure else {}))
    print(f"{stage}: {failure or 'done'} in {seconds:.0f} s", flush=True)
    return failure is None


def identity(row: Row) -> Row:
    """What tells a row from the others of its stage."""
    return {key: row[key] for key in ("name", "shape", "rows", "sequences", "tokens") if key in row}


def write_page(out: Path) -> None:
    """Write the rows of all stages as one Markdown table each."""
    rows = [json.loads(line) for line in (out / "gpu.json").read_text(encoding="utf-8").splitlines()]
    parts = [f"# permprune on {device_name()}\n\ntorch {torch.__version__}, {rows[-1]['date']}\n"]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        heads = list(dict.fromkeys(key for row in own for key in row if key not in HIDDEN))
        lines = [" | ".join(str(row.get(head, "")) for head in heads) for row in own]
        table = [" | ".join(heads), "|".join(["---"] * len(heads)), *lines]
        parts.append(f"## {stage}\n\n" + "\n".join(f"| {line} |" for line in table) + "\n")
    (out / "gpu.md").write_text("\n".join(parts), encoding="utf-8")


HIDDEN = ("stage", "version", "machine", "date")


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"


def fastest(calls: dict[str, Call], device: str) -> dict[str, float]:
    """Milliseconds of each call, the fastest of some turns. What cannot run here is left out, and said."""
    found: dict[str, float] = {}
    for name in list(calls):
        try:
            calls[name]()
        except (RuntimeError, NotImplementedError, ValueError) as error:
            print(f"{name}: {str(error).splitlines()[0]}")
            del calls[name]
    for _ in range(TURNS):
        for name, call in calls.items():
            wait(device)
            began = time.perf_counter()
            for _ in range(CALLS):
                call()
            wait(device)
            found[name] = min(found.get(name, float("inf")), 1000 * (time.perf_counter() - began) / CALLS)
    return found


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(cell: Row, calls: dict[str, Call], device: str, dense: str) -> Iterator[Row]:
    """A row for each call, with how many times as fast as `dense` it is."""
    found = fastest(calls, device)
    for name, milliseconds in found.items():
        yield {"name": name} | cell | {"ms": round(milliseconds, 4), "of dense": round(found[dense] / milliseconds, 2)}


def tests(options: argparse.Namespace) -> Iterator[Row]:
    """Run the tests that run on the GPU where there is one."""
    root = Path(__file__).parents[1]
    files = [str(file) for file in sorted((root / "tests").glob("*/**/test_gpu.py"))]
    files += [str(root / "tests" / "kernels" / "search" / "test_placement.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *files]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True)
    print(ended.stdout[-4000:])
    yield {"name": "tests of Triton kernels", "result": ended.stdout.strip().splitlines()[-1]}
    ended.check_returncode()


def products(options: argparse.Namespace) -> Iterator[Row]:
    """A packed product beside dense bf16, for few rows and many."""
    device, pattern = options.device, Pattern(2, 4)
    for rows, width in SHAPES[options.size]:
        weight = torch.randn(rows, width, device=device)
        weight *= pattern.mask(weight.abs())
        dense = weight.bfloat16()
        others = sparse_layers(weight)
        packed = {
            name: PackedLinear(PackedWeight.pack(weight, pattern, dtype)).to(device)
            for name, dtype in (("bf16", torch.bfloat16), ("int8", torch.int8), ("int4", INT4))
        }
        for batch in (1, 16, 64, 512, 4096) if options.size == "large" else (1, 70):
            x = torch.randn(batch, width, device=device).bfloat16()
            calls: dict[str, Call] = {"dense bf16": partial(F.linear, x, dense)}
            calls |= {f"packed {name}": partial(own, x) for name, own in packed.items()}
            calls |= {name: partial(own, x) for name, own in others.items()}
            yield from timed({"shape": f"{rows} x {width}", "rows": batch}, calls, device, "dense bf16")


def sparse_layers(weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The same weight in the sparse formats of PyTorch and torchao, those that can be made here."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    try:
        sparse = torch.sparse.to_sparse_semi_structured(weight.half())
        found["PyTorch 2:4, fp16"] = lambda x: F.linear(x.half(), sparse)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        print(f"to_sparse_semi_structured: {str(error).splitlines()[0]}")
    try:
        from torchao.quantization import Float8DynamicActivationFloat8SemiSparseWeightConfig, quantize_

        layer = nn.Linear(weight.shape[1], len(weight), bias=False, device=weight.device, dtype=torch.bfloat16)
        layer.weight.data = weight.bfloat16()
        quantize_(layer, Float8DynamicActivationFloat8SemiSparseWeightConfig())
        found["torchao FP8 2:4"] = layer
    except (ImportError, RuntimeError, NotImplementedError, ValueError, AssertionError) as error:
        print(f"torchao FP8 2:4: {str(error).splitlines()[0]}")
    return found


def cache(options: argparse.Namespace) -> Iterator[Row]:
    """Attention of one token over keys and values of 8 heads of 128 channels, with 32 queries; ours also adds it."""
    device, heads, width = options.device, 8, 128
    for batch, tokens in KEYS[options.size]:
        keys, values = torch.randn(2, batch, heads, tokens, width, device=device).bfloat16().unbind()
        query = torch.randn(batch, 4 * heads, 1, width, device=device).bfloat16()
        calls: dict[str, Call] = {
            "dense bf16": partial(F.scaled_dot_product_attention, query, keys, values, enable_gqa=True)
        }
        for pattern in ("4bit", "3bit", "auto"):
            layer = PackedCacheLayer(KVConfig(pattern, pattern))
            layer.update(keys, values)
            calls[f"packed {pattern}"] = partial(decode, layer, query, keys[:, :, :1])
        yield from timed({"sequences": batch, "tokens": tokens}, calls, device, "dense bf16")


def decode(layer: PackedCacheLayer, query: Tensor, state: Tensor) -> Tensor:
    """Add a token to a layer, and return what its query reads."""
    view, _ = layer.update(state, state)
    return attention(nn.Identity(), query, view, view, None)[0]


def placement(options: argparse.Namespace) -> Iterator[Row]:
    """The costs of moving a channel of each group into every other, in Triton and in PyTorch."""
    count, rows = (1024, 4096) if options.size == "large" else (16, 64)
    given = torch.rand(4, count, rows, device=options.device).unbind()
    calls: dict[str, Call] = {"PyTorch": lambda: place_reference(*given)}
    if runs_triton("cuda"):
        from permprune.kernels.search.gpu import place

        calls["Triton"] = lambda: place(*given)
    yield from timed({"shape": f"{count} groups x {rows}"}, calls, options.device, "PyTorch")


def demo(options: argparse.Namespace) -> Iterator[Row]:
    """Search, train, pack and verify, with the most memory of the device beside the forecast."""
    forecasts: list[Forecast] = []
    config = PruneConfig(order="ria", update="admm", train="steps=8", length=128)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began, folder = time.monotonic(), options.out / f"demo-{int(time.time())}"
    record = prune_to_folder(
        options.model,
        folder,
        config,
        evaluation=Evaluation(windows=16),
        pack="int8",
        begin=forecasts.append,
    )
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else None
    row: Row = {"name": options.model, "seconds": round(time.monotonic() - began, 1)}
    if record.measured is not None:
        row |= {side: getattr(record.measured, side) for side in SIDES}
    yield row | {"device bytes": peak, "forecast of device bytes": forecasts[0].device}
    verified = verify(folder)
    yield {"name": "verify", "layers": verified.layers, "difference": round(verified.difference, 4)}


STAGES = {"tests": tests, "products": products, "cache": cache, "placement": placement, "demo": demo}


if __name__ == "__main__":
    main()
