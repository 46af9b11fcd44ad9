"""Tiny files of the tasks that permprune reads from a folder, and what lm-eval's own tasks hold in their place."""

import json
from pathlib import Path
from typing import Any

from .fixtures import SENTENCES

ROWS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [
        {
            "question": "which weights survive?",
            "choices": {"text": ["the short", "the few: two", "none of the four"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        {
            "question": "what is short?\n(two words)",
            "choices": {"text": ["the text", "a model", "the order", "every layer"], "label": ["1", "2", "3", "4"]},
            "answerKey": "4",
        },
    ],
    "boolq": [
        {"passage": SENTENCES[0], "question": "is the order kept", "label": 1},
        {"passage": SENTENCES[1], "question": "is the model short", "label": 0},
    ],
    "hellaswag": [
        {"query": "Text: It is short. The words", "choices": ["are few", "drop", "change", "survive"], "label": 3},
        {"query": "Order: keep the weights.", "choices": ["two", "four", "it", "few"], "label": 0},
        {"query": "Text: It has (four) words. But", "choices": ["a", "an", "the", "no"], "label": 1},
    ],
    "piqa": [
        {"goal": "keep the weights", "sol1": "drop the text", "sol2": "change the order of the channels", "label": 1},
        {"goal": "change nothing", "sol1": "a permutation", "sol2": "a few words", "label": 0},
    ],
    "rte": [
        {"sentence1": SENTENCES[2], "sentence2": 'two are "dropped"', "label": 0},
        {"sentence1": SENTENCES[3], "sentence2": "the text has no words", "label": 1},
    ],
    "cb": [
        {"premise": SENTENCES[0], "hypothesis": "the order decides", "label": 0},
        {"premise": SENTENCES[1], "hypothesis": "it changes the model", "label": 1},
        {"premise": SENTENCES[2], "hypothesis": "the weights are small", "label": 2},
    ],
    "wic": [
        {"sentence1": "the order of words", "sentence2": "keep the order", "start1": 4, "end1": 9, "label": 1},
        {"sentence1": "a small window", "sentence2": "a model has a few", "start1": 2, "end1": 7, "label": 0},
    ],
}  # fmt: skip
ROWS["arc_challenge"] = ROWS["arc_easy"][::-1]

WIKITEXT = " \n = Text = \n \n" + "".join(f" {SENTENCES[at % 4]} . \n" for at in range(40)) + " \n"


def write_task_files(folder: Path) -> Path:
    """All files of docs/tasks.md, so that they hold `ROWS`; training files for rte alone. Returns the folder."""

    def write(name: str, text: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")

    def lines(rows: list[dict[str, Any]]) -> str:
        return "".join(json.dumps(row) + "\n" for row in rows)

    for name, task in (("ARC-Easy", "arc_easy"), ("ARC-Challenge", "arc_challenge")):
        write(f"zeroshot/{name}.test.json", json.dumps([wrapped(row) for row in ROWS[task]]))
    write("superglue/BoolQ/val.jsonl", lines([row | {"label": bool(row["label"]), "idx": 0} for row in ROWS["boolq"]]))
    contexts = ["Text: It is short. the words", "Order: keep the weights.", "Text: It has (four) words. but"]
    items = zip(contexts, ROWS["hellaswag"], strict=True)
    sixes = ["\n".join([context, str(row["label"]), *row["choices"]]) for context, row in items]
    write("zeroshot/hellaswag_val_full.txt", "\n".join(sixes) + "\n")
    write("zeroshot/piqa.valid.jsonl", lines([{k: v for k, v in row.items() if k != "label"} for row in ROWS["piqa"]]))
    write("zeroshot/piqa.valid-labels.lst", "".join(f"{row['label']}\n" for row in ROWS["piqa"]))
    table = "".join(f"{row['sentence1']}\t{row['sentence2']}\t{row['label']}\t0\n" for row in ROWS["rte"])
    write("glue/RTE/dev.tsv", "sentence1\tsentence2\tlabel\tidx\n" + table)
    shown = [f"0\t{SENTENCES[at]}\tthe text\t{right}\n" for at, right in ((1, "entailment"), (3, "not_entailment"))]
    write("glue/RTE/train.tsv", "index\tsentence1\tsentence2\tlabel\n" + "".join(shown))
    answers = ("entailment", "contradiction", "neutral")
    write("superglue/CB/val.jsonl", lines([row | {"label": answers[row["label"]]} for row in ROWS["cb"]]))
    write("superglue/WiC/val.jsonl", lines([row | {"label": bool(row["label"]), "word": ""} for row in ROWS["wic"]]))
    write("wikitext-2/wiki.test.raw", WIKITEXT)
    return folder


def wrapped(row: dict[str, Any]) -> dict[str, str]:
    """A question of ARC inside the instruction that LLM-Adapters gives its models."""
    texts = row["choices"]["text"]
    answers = " ".join(f"Answer{number}: {text}" for number, text in enumerate(texts, start=1))
    names = "/".join(f"answer{number + 1}" for number in range(len(texts)))
    question = f"Please choose the correct answer to the question: {row['question']}"
    answer = f"answer{row['answerKey']}"
    instruction = f"{question}\n\n{answers}\n\nAnswer format: {names}"
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}
