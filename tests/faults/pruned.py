"""Folders of pruned models that tests of faults start from."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

import permprune

from ..fixtures import SENTENCES, make_tiny_llama

SETTINGS: dict[str, Any] = {"order": "random", "precision": "fp32"}
SMALL = ["--windows", "4", "--length", "16"]
TUNED = ["--epochs", "1", "--rows", "16", "--length", "16", "--lr", "1e-2"]
WINDOWS = torch.randint(3, 128, (12, 16), generator=torch.Generator().manual_seed(0))


def write_source(folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32) -> Path:
    """A dense model and its tokenizer; the text beside them is what it can be calibrated and evaluated on."""
    make_tiny_llama().to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text("\n".join(SENTENCES[i % 4] for i in range(100)), encoding="utf-8")
    return folder


def write_pruned(source: Path, folder: Path, mode: str, **settings: Any) -> permprune.Pruned:
    """Prune the model of a folder in Python and write it to another."""
    model, tokenizer, _ = permprune.read_model(str(source))
    pruned = permprune.prune(model, tokenizer, examples=WINDOWS, mode=mode, **{**SETTINGS, **settings})
    pruned.save_pretrained(folder, tokenizer)
    shutil.copy(source / "text.txt", folder)
    return pruned


def options(source: Path) -> list[str]:
    """What `prune` and `compare` need to run fast on a model."""
    text = str(source / "text.txt")
    return ["--calibration", text, "--data", text, "--samples", "24", *SMALL]


def commands(folder: Path, out: Path) -> dict[str, list[Any]]:
    """The command lines that read a folder."""
    text = folder / "text.txt"
    return {
        "verify": ["verify", folder],
        "evaluate": ["evaluate", folder, "--data", text, *SMALL],
        "prune": ["prune", folder, *options(folder), "--order", "none", "--out", out],
        "finetune": ["finetune", folder, "--data", text, *TUNED, "--out", out],
    }


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = WINDOWS) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids).logits.float()
    return found
