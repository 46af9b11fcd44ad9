"""A packed model beside llama.cpp with the same dense weights: a Markdown table of bytes, tokens/s and perplexity.

--gguf is the dense model as a GGUF file; llama.cpp requantizes it to Q8_0 and Q4_0. --packed are folders written by
`permprune pack` from a pruned checkpoint of the same model, and --dense is that model, which PyTorch runs in fp32 and
bf16. Every model has its own process. The processes take turns, and the fastest of all turns counts. Perplexity is over
the first windows of --text, which all models receive as the same token ids, each window on its own.

Needs llama-cpp-python, which compiles llama.cpp for the processor it is installed on.

python benchmarks/engines.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --packed packed-bf16 packed-int8 --text TEXT
"""

import argparse
import ctypes
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import add
from torch.nn.functional import cross_entropy

from permprune import load, read_model
from permprune.evaluation.size import stored_bytes
from permprune.evaluation.speed import measure_speed
from permprune.models.processors import tokenizer_of

STEPS = 64
"""Tokens that are generated in each turn."""
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Answers = dict[str, Callable[..., Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--packed", nargs="*", default=[])
    parser.add_argument("--dense", default="smollm2-135m")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window, and of the prompt that is timed")
    parser.add_argument("--context", type=int, default=128, help="tokens before the generated ones")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    options = parser.parse_args()
    windows = read_windows(options.dense, options.text, options.windows, options.length)
    with tempfile.TemporaryDirectory() as folder:
        models: list[tuple[str, Callable[..., Answers], Any]] = [
            (f"PyTorch {dtype}, dense", torch_model, (options.dense, dtype)) for dtype in TYPES
        ]
        models += [(f"permprune {Path(path).name}", torch_model, (path, None)) for path in options.packed]
        models += [
            (f"llama.cpp {name}, dense", llama_model, requantized(options.gguf, name, folder)) for name in FTYPES
        ]
        pipes = [start(build, source, options.threads) for _, build, source in models]
        sizes = [ask(pipe, "bytes") for pipe in pipes]
        cells = [(options.context, STEPS), (options.length, 1)]
        best = {(at, cell): (np.inf, np.inf) for at in range(len(pipes)) for cell in cells}
        for cell in cells:
            for _ in range(options.turns):
                for at, pipe in enumerate(pipes):
                    best[at, cell] = tuple(map(min, best[at, cell], ask(pipe, "speed", *cell)))
        quality = [ask(pipe, "perplexity", windows) for pipe in pipes]
        print("| model | MB | tokens/s, generated | tokens/s, prompt | perplexity |\n|---|---|---|---|---|")
        for at, (name, _, _) in enumerate(models):
            prompt, step = best[at, cells[1]][0], best[at, cells[0]][1]
            speeds = f"{1 / step:.1f} | {options.length / prompt:.0f}"
            print(f"| {name} | {sizes[at] / 1e6:.0f} | {speeds} | {quality[at]:.2f} |")
            cell = {"table": "engines", "model": name, "threads": options.threads, "context": options.context}
            factor = round(quality[at] / quality[0], 3)
            add(options.rows, cell, {"bytes": sizes[at], "decode": 1 / step, "perplexity_factor": factor})


def read_windows(model: str, text: Path, count: int, length: int) -> np.ndarray:
    _, processor, _ = read_model(model)
    ids = tokenizer_of(processor)(text.read_text(encoding="utf-8")[: 8 * count * length]).input_ids
    return np.array(ids[: count * length]).reshape(count, length)


def start(build: Callable[..., Answers], source: Any, threads: int) -> Connection:
    context = multiprocessing.get_context("spawn")
    own, other = context.Pipe()
    context.Process(target=serve, args=(other, build, source, threads), daemon=True).start()
    other.close()
    return own


def serve(pipe: Connection, build: Callable[..., Answers], source: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    answers = build(source, threads)
    with suppress(EOFError):  # the benchmark has ended
        while True:
            name, arguments = pipe.recv()
            pipe.send(answers[name](*arguments))


def ask(pipe: Connection, name: str, *arguments: Any) -> Any:
    pipe.send((name, arguments))
    return pipe.recv()


def torch_model(source: tuple[str, str | None], _threads: int) -> Answers:
    name, dtype = source
    model = load(name) if dtype is None else read_model(name)[0].to(TYPES[dtype])

    def speed(context: int, steps: int) -> tuple[float, float]:
        found = measure_speed(model, batch=1, context=context, steps=steps)
        return found.first_token, found.next_token

    @torch.inference_mode()
    def perplexity(windows: np.ndarray) -> float:
        ids = torch.from_numpy(windows)
        losses = [cross_entropy(model(own[None]).logits[0, :-1].float(), own[1:]).item() for own in ids]
        return float(np.exp(np.mean(losses)))

    return {"bytes": lambda: stored_bytes(model), "speed": speed, "perplexity": perplexity}


def llama_model(path: str, threads: int) -> Answers:
    from llama_cpp import Llama

    def run(ids: np.ndarray, all_logits: bool) -> Any:
        model = Llama(
            path, n_ctx=2048, n_threads=threads, n_threads_batch=threads, logits_all=all_logits, verbose=False, seed=0
        )
        model.eval(ids.tolist())
        return model

    model = run(np.arange(8), all_logits=False)

    def speed(context: int, steps: int) -> tuple[float, float]:
        prompt = np.random.default_rng(0).integers(model.n_vocab(), size=context).tolist()
        model.reset()
        began = time.perf_counter()
        model.eval(prompt)
        read = time.perf_counter()
        for _ in range(steps):
            logits = np.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),))
            model.eval([int(logits.argmax())])
        return read - began, (time.perf_counter() - read) / steps

    def perplexity(windows: np.ndarray) -> float:
        losses = []
        for window in windows:
            logits = torch.from_numpy(run(window, all_logits=True).scores[: len(window) - 1])
            losses.append(cross_entropy(logits, torch.from_numpy(window)[1:]).item())
        return float(np.exp(np.mean(losses)))

    return {"bytes": lambda: Path(path).stat().st_size, "speed": speed, "perplexity": perplexity}


FTYPES = {"Q8_0": 7, "Q4_0": 2}
"""Types of GGUF files, by llama.cpp's name, with their numbers in its enum llama_ftype."""


def requantized(file: Path, name: str, folder: str) -> str:
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.allow_requantize = FTYPES[name], True
    out = f"{folder}/{name}.gguf"
    if llama_cpp.llama_model_quantize(str(file).encode(), out.encode(), ctypes.byref(settings)):
        raise SystemExit(f"llama.cpp does not convert {file} to {name}")
    return out


if __name__ == "__main__":
    main()
