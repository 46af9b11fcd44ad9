"""Tasks in lm-eval's files, which are read without a network and without the list of all tasks."""

from pathlib import Path
from typing import Any

from ..fixtures import SENTENCES

CODE = """
from pathlib import Path
from datasets import Dataset

Path(__file__).with_name("ran").touch()
ROWS = {rows}

def splits(**_):
    return {{"evaluation": Dataset.from_list(ROWS)}}
"""
TASK = """
task: {name}
custom_dataset: !function rows.splits
output_type: multiple_choice
test_split: evaluation
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROWS: list[dict[str, Any]] = [
    {"goal": "keep the weights", "sol1": "drop the text", "sol2": "change the order of the channels", "label": 1},
    {"goal": "change nothing", "sol1": "a permutation", "sol2": "a few words", "label": 0},
    {"goal": "the text is short", "sol1": "two of every four", "sol2": "it", "label": 0},
]
WIKITEXT = "\n\n".join(["", " = Text = \n", "", *(f" {SENTENCES[at % 4]} . \n" for at in range(40)), ""])


def write_task(folder: Path, name: str = "own") -> Path:
    """Write the file of a task of `ROWS`, and the code beside it that reads them; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.py").write_text(CODE.format(rows=ROWS))
    file = folder / f"{name}.yaml"
    file.write_text(TASK.format(name=name))
    return file
