"""Convert models whose package contains an ordinary Transformers folder with safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer


def convert(files: Sequence[Path], folder: Path) -> None:
    """Write an encoder to `folder` in fp32, with its tokenizer.

    `files` are the paths of its config, weights and tokenizer files, all in one folder.
    """
    source = files[0].parent
    model = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)
