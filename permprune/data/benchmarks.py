"""Benchmark tasks for language models, read from a local folder into rows with the columns of lm-eval's own tasks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permprune.data.sources import read_table, read_text
from permprune.data.text import load_documents
from permprune.errors import PermpruneError

if TYPE_CHECKING:
    from datasets import Dataset


Row = dict[str, Any]

WIKITEXT_FILE = "wikitext-2/wiki.test.raw"
WIKITEXT_ID = "Salesforce/wikitext:wikitext-2-raw-v1@test"

_ARC = re.compile(
    r"Please choose the correct answer to the question: (.*)\n\nAnswer1: (.*)\n\nAnswer format: .*", re.DOTALL
)
_OPEN = re.compile(r"(.*[.!?][\"')]? )(.+)")


@dataclass(frozen=True)
class TaskFiles:
    """The files of a task and how to read them.

    `files` are paths within the data folder, with "{}" for the name of the part; `part` is the part to evaluate on.
    `read` converts the files to records, and `row` converts a record to the columns that the task's prompt needs.
    """

    files: tuple[str, ...]
    part: str
    read: Callable[..., list[Any]]
    row: Callable[[Any], Row]

    def rows(self, folder: Path, part: str) -> list[Row]:
        """Read the rows of a part. Raises `PermpruneError` if a file is missing or has an unexpected format."""
        paths = [folder / file.format(part) for file in self.files]
        for path in paths:
            if not path.is_file():
                raise PermpruneError(f"there is no {path}: arrange the files of --data as docs/tasks.md says")
        rows = []
        for number, record in enumerate(self.read(*paths), start=1):
            try:
                rows.append(self.row(record))
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise PermpruneError(
                    f"{paths[0]}, record {number} is not in the format of docs/tasks.md: {type(error).__name__} {error}"
                ) from error
        return rows


def splits(name: str, data: str, few_shot: int = 0, **_: Any) -> dict[str, Dataset]:
    """Load the "evaluation" rows of a task from the folder `data`, and its "training" rows if `few_shot` is not 0.

    lm-eval calls this for the tasks in permprune/evaluation/local_tasks, with the task's metadata as arguments. Raises
    `PermpruneError` if a file is missing or does not have the expected format.
    """
    from datasets import Dataset

    source, folder = SOURCES[name], Path(data)
    shown = source.rows(folder, "train") if few_shot else []
    return {
        "evaluation": Dataset.from_list(source.rows(folder, source.part)),
        "training": Dataset.from_list(shown),
    }


def wikitext2(folder: Path | None) -> str:
    """The test part of WikiText-2 as one text, its lines joined by blank lines as in GPTQ, SparseGPT and Wanda.

    It is read from the raw file in `folder`, or from the hub if `folder` is None. Raises `PermpruneError` if it cannot
    be read.
    """
    if folder is None:
        return load_documents(WIKITEXT_ID, "evaluation")[0]
    lines = read_text(folder / WIKITEXT_FILE).removesuffix("\n").split("\n")
    return "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)


def _read_sixes(path: Path) -> list[list[str]]:
    lines = read_text(path).removesuffix("\n").split("\n")
    return [lines[start : start + 6] for start in range(0, len(lines), 6)]


def _read_beside(path: Path, labels: Path) -> list[Row]:
    rows, right = read_table(path), read_text(labels).split()
    if len(rows) != len(right):
        raise PermpruneError(
            f"{path} has {len(rows)} records and {labels} {len(right)} labels: give a label for each record"
        )
    return [{**row, "label": label} for row, label in zip(rows, right, strict=True)]


def _arc(record: Row) -> Row:
    """Extract the question and the choices from an instruction of LLM-Adapters (Hu et al. 2023)."""
    parsed = _ARC.fullmatch(record["instruction"])
    if parsed is None:
        raise ValueError("no question with answers in the instruction")
    texts = re.split(r" Answer\d+: ", parsed[2])
    labels = [str(number) for number in range(1, len(texts) + 1)]
    key = record["answer"].removeprefix("answer")
    labels.index(key)
    return {"question": parsed[1], "choices": {"text": texts, "label": labels}, "answerKey": key}


def _hellaswag(record: list[str]) -> Row:
    """Convert six lines in llama.cpp's format: a context, the index of the correct ending, and four endings.

    As lm-eval does, the beginning of an incomplete last sentence of the context, the words after the last full stop, is
    capitalized. Contexts that end in a full stop come from WikiHow and have no incomplete sentence.
    """
    context, right, *endings = record
    if len(endings) != 4:
        raise ValueError(f"{len(endings)} endings")
    if not context.endswith("."):
        context = _OPEN.sub(lambda match: match[1] + match[2].capitalize(), context)
    return {"query": context, "choices": endings, "label": range(4)[int(right)]}


def _labelled(*columns: str, label: Callable[[Any], int] = int) -> Callable[[Row], Row]:
    """Return a function that takes these columns of a record, and the column "label" converted by `label`."""
    return lambda record: {**{name: record[name] for name in columns}, "label": label(record["label"])}


_PIQA = _labelled("goal", "sol1", "sol2", label=lambda label: range(2)[int(label)])
_BOOLQ = _labelled("passage", "question")
_RTE = _labelled("sentence1", "sentence2", label={"0": 0, "1": 1, "entailment": 0, "not_entailment": 1}.__getitem__)
_CB = _labelled("premise", "hypothesis", label=("entailment", "contradiction", "neutral").index)
_WIC = _labelled("sentence1", "sentence2", "start1", "end1")

SOURCES = {
    "arc_easy": TaskFiles(("zeroshot/ARC-Easy.{}.json",), "test", read_table, _arc),
    "arc_challenge": TaskFiles(("zeroshot/ARC-Challenge.{}.json",), "test", read_table, _arc),
    "boolq": TaskFiles(("superglue/BoolQ/{}.jsonl",), "val", read_table, _BOOLQ),
    "hellaswag": TaskFiles(("zeroshot/hellaswag_{}_full.txt",), "val", _read_sixes, _hellaswag),
    "piqa": TaskFiles(("zeroshot/piqa.{}.jsonl", "zeroshot/piqa.{}-labels.lst"), "valid", _read_beside, _PIQA),
    "rte": TaskFiles(("glue/RTE/{}.tsv",), "dev", read_table, _RTE),
    "cb": TaskFiles(("superglue/CB/{}.jsonl",), "val", read_table, _CB),
    "wic": TaskFiles(("superglue/WiC/{}.jsonl",), "val", read_table, _WIC),
}
"""The tasks by their names in lm-eval."""
