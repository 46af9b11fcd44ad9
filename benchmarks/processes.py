"""Memory of each process that prunes one model: alone, and where several divide the rows of its weights.

A random LLaMA of the shape given, stored in bf16, is pruned by `permprune.prune_to_folder` in 1, 2 and 4 processes,
which `torchrun` starts for more than one. Printed are the peak memory of each process, the largest over that of the
single process, and the held-out losses.

python benchmarks/processes.py --hidden 2048 --inner 5632 --layers 8
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rows import add
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import permprune
from permprune.permuters.base import Identity
from permprune.permuters.trust_region import Newton
from permprune.system import distributed
from permprune.system.memory import keep_freed_memory, peak_memory_mb

WORDS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    for name, default in {"hidden": 2048, "inner": 5632, "layers": 8, "vocabulary": 32000, "length": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--mode", default="fold")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = LlamaConfig(
            hidden_size=options.hidden,
            intermediate_size=options.inner,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 64,
            num_key_value_heads=max(1, options.hidden // 512),
            vocab_size=options.vocabulary,
            max_position_embeddings=2048,
        )
        write_model(folder / "model", config)
        rows = [measured(folder, count, options) for count in options.processes]
    print("| processes | peak of each, MiB | largest / single | held-out losses | seconds |\n|---|---|---|---|---|")
    for count, (peaks, losses, seconds) in zip(options.processes, rows, strict=True):
        each = ", ".join(f"{peak:.0f}" for peak in peaks)
        print(f"| {count} | {each} | {max(peaks) / max(rows[0][0]):.2f} | {losses} | {seconds:.0f} |")
        add(options.rows, {"table": "processes", "processes": count}, {"peaks": [round(peak) for peak in peaks]})


def write_model(folder: Path, config: LlamaConfig) -> None:
    """Write a random model in bf16 and a tokenizer of words, and beside the folder texts of words."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    draw = random.Random(0)
    for part in ("calibration", "evaluation"):
        text = "\n".join(" ".join(f"w{draw.randrange(WORDS)}" for _ in range(40)) for _ in range(200))
        (folder.parent / f"{part}.txt").write_text(text)


def measured(folder: Path, count: int, options: argparse.Namespace) -> tuple[list[float], list[float], float]:
    """Prune in so many processes; returns the peak memory of each in MiB, the held-out losses and the seconds."""
    started = time.monotonic()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    out = folder / str(count)
    subprocess.run(
        [sys.executable, *launch, __file__, "--worker", out, options.mode, options.precision, str(options.length)],
        check=True,
    )
    peaks = [json.loads((folder / f"{count}-{rank}.json").read_text()) for rank in range(count)]
    losses = [point["loss"] for point in json.loads((out / "permprune.json").read_text())["curve"]]
    print(f"{count} processes: {peaks} MiB, {losses}", flush=True)
    return peaks, losses, time.monotonic() - started


def work(out: Path, mode: str, precision: str, length: int) -> None:
    """Prune the model, and write the peak memory of this process."""
    keep_freed_memory()  # as the command line does
    with distributed.processes():
        count, rank = distributed.world(), distributed.rank()
        config = permprune.PruneConfig(
            mode=mode,
            precision=precision,
            order=Newton(start=Identity(), rounds=1, swaps=1, examples=4),
            calibration=str(out.parent / "calibration.txt"),
            length=length,
            samples=12,
            measured=4,
            held_out=4,
            shard=True if count > 1 else None,
        )
        evaluation = permprune.Evaluation(str(out.parent / "evaluation.txt"), 4, length)
        permprune.prune_to_folder(str(out.parent / "model"), out, config, evaluation=evaluation)
        (out.parent / f"{count}-{rank}.json").write_text(json.dumps(peak_memory_mb()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5]))
    else:
        main()
