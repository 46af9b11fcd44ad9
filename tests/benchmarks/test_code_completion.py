"""The problems of the benchmark of code, how they are run, and what a model is asked."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ..conversations import with_template

FILE = Path(__file__).parents[2] / "benchmarks" / "code_completion.py"


@pytest.fixture(scope="module")
def code() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FILE.parent)
        return runpy.run_path(str(FILE))


PROBLEMS: list[dict[str, str]] = json.loads((FILE.parent / "code_problems.json").read_text(encoding="utf-8"))


def test_problems_are_distinct() -> None:
    assert len({problem["name"] for problem in PROBLEMS}) == len(PROBLEMS) == 40
    assert all(problem["prompt"].startswith(f"def {problem['name']}(") for problem in PROBLEMS)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem["name"])
def test_solutions_pass_and_others_do_not(problem: dict[str, str]) -> None:
    argument = problem["prompt"].partition("(")[2].partition(":")[0]

    def run(body: str) -> None:
        exec(f"{problem['prompt']}{body}\n{problem['tests']}", {})

    run(problem["solution"])
    wrong = ["None", argument, "0", "''", "[]", "{}", "True", "False", "-1"]
    for body in wrong:
        with pytest.raises((AssertionError, TypeError, AttributeError)):
            run(f"    return {body}\n")


def test_programs_are_run_with_limits(code: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    problem, failure = PROBLEMS[0], code["failure"]
    monkeypatch.setitem(failure.__globals__, "SECONDS", 3)
    assert failure(problem, problem["prompt"] + problem["solution"]) == ""
    assert failure(problem, problem["prompt"] + "    return numbers\n") == "AssertionError"
    assert failure(problem, problem["prompt"] + "    while True:\n        pass\n") == "no end within 3 seconds"
    assert failure(problem, "import os\nos._exit(0)\n") == "the program ended before its tests"
    assert failure(problem, problem["prompt"] + "    return [0] * 2**31\n") == "MemoryError"
    assert failure(problem, "def running_maximum(") == "SyntaxError: '(' was never closed"


def test_the_function_is_taken_from_an_answer(code: dict[str, Any]) -> None:
    problem, program = PROBLEMS[0], code["program"]
    whole, prompt = problem["prompt"] + problem["solution"], problem["prompt"]
    answers = [
        f"Here it is:\n\n```python\n{whole}\n```\nIt works.",
        f"```\n{whole}",
        f"```python\nprint(1)\n```\n```python\n{whole}```",
    ]
    for answer in answers:
        assert code["failure"](problem, program(problem, answer, chats=True)) == ""
    for written in (
        problem["solution"],
        f"{problem['solution']}\n\ndef other():\n    return",
        f"```\n{problem['solution']}",
    ):
        chats = written.startswith("```")
        assert program(problem, written, chats=chats).startswith(prompt)
        assert code["failure"](problem, program(problem, written, chats=chats)) == ""


@pytest.mark.parametrize("template", [False, True])
def test_a_model_is_asked(
    template: bool,
    code: dict[str, Any],
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = with_template(tiny_tokenizer) if template else tiny_tokenizer
    monkeypatch.setitem(code["complete"].__globals__, "TOKENS", 8)
    monkeypatch.setitem(code["complete"].__globals__, "BATCH", 2)
    asked: list[str] = []
    forward = tiny_llama.forward

    def seen(input_ids: torch.Tensor, **options: Any) -> Any:
        asked.extend(tokenizer.batch_decode(input_ids))
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(tiny_llama, "forward", seen)
    prompts = ["def which(the text):\n", "def the(text):\n", "def which(the one of the text):\n"]
    problems = [{**PROBLEMS[0], "prompt": prompt} for prompt in prompts]
    written = list(code["complete"](tiny_llama, tokenizer, problems))
    assert ("<s> user" in asked[0]) == template
    assert all(text.startswith(prompt) for text, prompt in zip(written, prompts, strict=True))
    alone = [text for problem in problems for text in code["complete"](tiny_llama, tokenizer, [problem])]
    assert written == alone
