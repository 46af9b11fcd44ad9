"""Models whose package holds an ordinary Transformers folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer


def convert(files: Sequence[Path], folder: Path) -> None:
    """Write the encoder whose config, weights and tokenizer lie beside each other to `folder`, in fp32."""
    source = files[0].parent
    model = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)
