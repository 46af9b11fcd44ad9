"""Tables of every format that are read, with the same rows."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".json")


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows in the format of the suffix."""
    match path.suffix.lower():
        case ".parquet":
            datasets.Dataset.from_list([*rows]).to_parquet(path)
        case ".json":
            path.write_text(json.dumps(rows))
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case suffix:
            text, plain = io.StringIO(), {"quoting": csv.QUOTE_NONE, "quotechar": None}
            options: dict[str, Any] = {"delimiter": "\t", **plain} if suffix == ".tsv" else {}
            writer = csv.DictWriter(text, rows[0].keys(), **options)
            writer.writeheader()
            writer.writerows(rows)
            path.write_text(text.getvalue(), newline="")
    return path
