"""A packed model beside llama.cpp with the same dense weights: a Markdown table of bytes, tokens/s and perplexity.

--dense is a model of the LLaMA family. PyTorch runs it in --types, and llama.cpp quantizes it to --quantized. --packed
are folders written by `permprune pack` from pruned checkpoints of the same model. Every model has its own process. The
processes take turns, and the fastest of all turns counts. Perplexity is over the first windows of --text, which all
models receive as the same token ids, each window on its own.

Needs gguf and llama-cpp-py-sync, whose wheels contain llama.cpp compiled for AVX2.

python benchmarks/engines.py --packed packed-bf16 packed-int4 --text wiki.test.raw --threads 1
"""

import argparse
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
    parser.add_argument("--packed", nargs="*", default=[])
    parser.add_argument("--types", nargs="*", choices=TYPES, default=list(TYPES))
    parser.add_argument("--quantized", nargs="*", choices=FILE_TYPES, default=list(FILE_TYPES))
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
            (f"PyTorch {dtype}, dense", torch_model, (options.dense, dtype)) for dtype in options.types
        ]
        models += [(f"permprune {Path(path).name}", torch_model, (path, None)) for path in options.packed]
        if options.quantized:
            write_gguf(options.dense, f"{folder}/fp32.gguf")
        models += [
            (f"llama.cpp {name}, dense", llama_model, quantized(f"{folder}/fp32.gguf", name, folder))
            for name in options.quantized
        ]
        pipes = [start(build, source, options.threads) for _, build, source in models]
        sizes = [ask(pipe, "bytes") for pipe in pipes]
        quality = [ask(pipe, "perplexity", windows) for pipe in pipes]
        cells = [(options.context, STEPS), (options.length, 1)]
        best = fastest(pipes, cells, options.turns)
        print("| model | MB | tokens/s, generated | tokens/s, prompt | perplexity |\n|---|---|---|---|---|")
        for at, (name, _, _) in enumerate(models):
            prompt, step = best[at, cells[1]][0], best[at, cells[0]][1]
            speeds = f"{1 / step:.1f} | {options.length / prompt:.0f}"
            print(f"| {name} | {sizes[at] / 1e6:.0f} | {speeds} | {quality[at]:.2f} |")
            cell = {"table": "engines", "model": name, "threads": options.threads, "context": options.context}
            figures = {"bytes": sizes[at], "decode": 1 / step, "prefill": options.length / prompt}
            add(options.rows, cell, figures | {"perplexity_factor": round(quality[at] / quality[0], 3)})


def read_windows(model: str, text: Path, count: int, length: int) -> np.ndarray:
    _, processor, _ = read_model(model)
    ids = tokenizer_of(processor)(text.read_text(encoding="utf-8")[: 8 * count * length]).input_ids
    return np.array(ids[: count * length]).reshape(count, length)


def fastest(
    pipes: list[Connection], cells: list[tuple[int, int]], turns: int
) -> dict[tuple[int, tuple[int, int]], tuple[float, float]]:
    """The shortest times of each process in each cell, by its place: of a prompt, and of a token after it."""
    best = {(at, cell): (np.inf, np.inf) for at in range(len(pipes)) for cell in cells}
    for cell in cells:
        for _ in range(turns):
            for at, pipe in enumerate(pipes):
                prompt, step = ask(pipe, "speed", *cell)
                best[at, cell] = (min(prompt, best[at, cell][0]), min(step, best[at, cell][1]))
    return best


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
    from llama_cpp_py_sync import Llama

    model = Llama(path, n_ctx=2048, n_threads=threads)
    native, context, vocabulary = model._lib, model._ctx, model.n_vocab

    def run(ids: list[int], at: int, every: bool = False) -> np.ndarray:
        """Read tokens at a position; returns the logits of the last one, or of every one."""
        batch = native.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, at + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = every or place == len(ids) - 1
        if native.llama_decode(context, batch):
            raise SystemExit(f"llama.cpp does not run {path}")
        count = len(ids) if every else 1
        logits = model._ffi.buffer(native.llama_get_logits(context), 4 * count * vocabulary)
        native.llama_batch_free(batch)
        return np.frombuffer(logits, np.float32).reshape(count, vocabulary)

    def speed(prompt: int, steps: int) -> tuple[float, float]:
        ids = np.random.default_rng(0).integers(vocabulary, size=prompt).tolist()
        model._clear_context_state()
        began = time.perf_counter()
        logits = run(ids, 0)
        read = time.perf_counter()
        for step in range(steps):
            logits = run([int(logits.argmax())], prompt + step)
        return read - began, (time.perf_counter() - read) / steps

    def perplexity(windows: np.ndarray) -> float:
        losses = []
        for window in windows:
            model._clear_context_state()
            logits = torch.from_numpy(run(window.tolist(), 0, every=True)[:-1].copy())
            losses.append(cross_entropy(logits, torch.from_numpy(window)[1:]).item())
        return float(np.exp(np.mean(losses)))

    return {"bytes": lambda: Path(path).stat().st_size, "speed": speed, "perplexity": perplexity}


FILE_TYPES = {"Q8_0": 7, "Q4_0": 2, "Q3_K_S": 11, "Q2_K": 10}
"""Types of GGUF files, by llama.cpp's name, with their numbers in its enum llama_ftype."""

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Names of the modules of a LLaMA model in Transformers and in a GGUF file."""


def write_gguf(name: str, path: str) -> None:
    """Write a LLaMA model as GGUF in fp32, without its tokenizer: all engines receive token ids."""
    from gguf import GGUFWriter

    model = read_model(name)[0].float()
    config, heads = model.config, model.config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for key, tensor in dict(model.named_parameters()).items():  # tied ones once
        owner = key.removesuffix(".weight").removeprefix("model.layers.")
        layer, _, part = owner.partition(".")
        own = f"blk.{layer}.{NAMES[part]}" if layer.isdigit() else NAMES[owner]
        value = tensor.detach()
        if part in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp rotates neighbours, Transformers halves
            value = value.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{own}.weight", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized(file: str, name: str, folder: str) -> str:
    """Quantize a GGUF file with llama.cpp; returns the new one."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    settings = get_ffi().new("llama_model_quantize_params *", get_lib().llama_model_quantize_default_params())
    settings.ftype, settings.nthread = FILE_TYPES[name], 1
    out = f"{folder}/{name}.gguf"
    if get_lib().llama_model_quantize(file.encode(), out.encode(), settings):
        raise SystemExit(f"llama.cpp does not convert {file} to {name}")
    return out


if __name__ == "__main__":
    main()
