"""Completion of code, measured by running it: the share of small problems in Python that a model solves (pass@1).

The problems of `code_problems.json` are our own: a signature with a docstring, and assertions that the model does not
see. The likeliest token is chosen each time. A model with a chat template is asked for the function in a block of code;
another continues the prompt. The completed function and the assertions run in a process of their own, with limits of
time and memory, but with the rights of this one: run models that you trust, or in a container.

python benchmarks/code_completion.py qwen2.5-coder-1.5b pruned packed --rows code.jsonl
"""

import argparse
import json
import re
import resource
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rows import add
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from permprune.checkpoints.io import read_as_stored
from permprune.models.processors import tokenizer_of

PROBLEMS = Path(__file__).with_name("code_problems.json")

SECONDS, MEMORY = 10, 2**30
"""The limits of a process: seconds of time, and bytes of memory."""

TOKENS = 400
"""The most tokens of a completion; those of the solutions have at most 200."""

ASKED = "Complete this Python function. Answer with the whole function in a block of code.\n\n```python\n{prompt}```"

BLOCK = re.compile(r"```(?:python|py)?\n(.*?)(?:\n```|\Z)", re.DOTALL)
ENDS = {True: ["\n```\n"], False: ["\ndef ", "\nclass ", "\nif ", "\nprint", "\nassert ", "\n#", "\n```"]}
"""What ends a completion, with a chat template and without one."""

BATCH = 8
"""Problems at once: a step of decoding reads the weights once for all of them."""

Problem = dict[str, str]
"""The "name" of a function, its "prompt", a "solution" that continues the prompt, and "tests"."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names or folders: dense, pruned or packed")
    parser.add_argument("--count", type=int, help="the first problems alone")
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    options = parser.parse_args()
    problems = json.loads(PROBLEMS.read_text(encoding="utf-8"))[: options.count]
    print("| model | problems | pass@1 |\n|---|---|---|", flush=True)
    for name in options.models:
        model, processor = read_as_stored(name)
        tokenizer, passed = tokenizer_of(processor), list[str]()
        for problem, code in zip(problems, complete(model.eval(), tokenizer, problems), strict=True):
            reason = failure(problem, code)
            print(f"{problem['name']}: {reason or 'passed'}", file=sys.stderr, flush=True)
            passed += [] if reason else [problem["name"]]
        share = len(passed) / len(problems)
        error = (share * (1 - share) / len(problems)) ** 0.5
        print(f"| {name} | {len(problems)} | {100 * share:.1f} ± {100 * error:.1f} % |", flush=True)
        cell = {"table": "code", "model": name, "problems": len(problems)}
        add(options.rows, cell, {"pass@1": share, "stderr": error, "passed": passed})


def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]) -> Iterator[str]:
    """Return, for each problem, the program with the function that a model writes; several are written at once."""
    settings, chats = _settings(model.generation_config, tokenizer), bool(tokenizer.chat_template)
    prompts = [_prompt(tokenizer, problem) for problem in problems]
    for first in range(0, len(problems), BATCH):
        written = _continue(model, tokenizer, prompts[first : first + BATCH], settings)
        for problem, text in zip(problems[first : first + BATCH], written, strict=True):
            yield program(problem, text, chats=chats)


def _prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> str:
    """Return the text that a model continues."""
    if not tokenizer.chat_template:
        return problem["prompt"]
    turns = [{"role": "user", "content": ASKED.format(prompt=problem["prompt"])}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _settings(own: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return the settings of greedy decoding, with the tokens of a checkpoint that end a text."""
    pads = (own.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return GenerationConfig(
        max_new_tokens=TOKENS,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # else that of the checkpoint
        eos_token_id=own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id,
        pad_token_id=next((pad for pad in pads if pad is not None), None),
    )


@torch.inference_mode()
def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], settings: GenerationConfig
) -> list[str]:
    """Return the likeliest continuation of each prompt; prompts are padded on the left, to end together."""
    chats = bool(tokenizer.chat_template)
    coded = [tokenizer(prompt, add_special_tokens=not chats)["input_ids"] for prompt in prompts]
    width = max(len(row) for row in coded)
    pad = settings.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in coded], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in coded], device=model.device)

    def texts(ids: Tensor) -> list[str]:
        return tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)

    def ended(ids: Tensor, _scores: Any) -> Tensor:
        return torch.tensor([any(end in text for end in ENDS[chats]) for text in texts(ids)], device=ids.device)

    generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
    return texts(generate(input_ids=ids, attention_mask=mask, generation_config=settings, stopping_criteria=[ended]))


def program(problem: Problem, written: str, *, chats: bool) -> str:
    """Return the program of what a model wrote: the block of code of its answer, or the prompt and its continuation.

    A block without the signature continues the prompt, too.
    """
    if not chats:
        body = min((place for end in ENDS[False] if (place := written.find(end)) >= 0), default=len(written))
        return problem["prompt"] + written[:body]
    blocks = BLOCK.findall(written) or [written]
    signature = f"def {problem['name']}("
    return next((block for block in blocks if signature in block), problem["prompt"] + blocks[0])


def failure(problem: Problem, code: str) -> str:
    """Run a program and the assertions of a problem; returns "" if all hold, or else the reason."""
    passed = secrets.token_hex()  # printed after the assertions: a program that ends before them has not passed
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(f"{code}\n\n{problem['tests']}\nprint({passed!r})\n", encoding="utf-8")
        try:
            run = subprocess.run(
                [sys.executable, "-I", path.name],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=SECONDS,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
            )
        except subprocess.TimeoutExpired:
            return f"no end within {SECONDS} seconds"
    if run.returncode == 0 and run.stdout.endswith(f"{passed}\n"):
        return ""
    return (run.stderr.strip().splitlines() or ["the program ended before its tests"])[-1]


if __name__ == "__main__":
    main()
