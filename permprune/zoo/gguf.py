"""Convert language models from GGUF files, which Transformers can read."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(files: Sequence[Path], folder: Path) -> None:
    """Write the model in a GGUF file to `folder` in fp32, with its tokenizer.

    `files` are the consecutive parts of one GGUF file, one or several. They are joined in the folder of the first part,
    which must contain nothing else.
    """
    whole = files[0].with_name("model.gguf")
    files[0].rename(whole)
    with whole.open("ab") as sink:
        for part in files[1:]:
            with part.open("rb") as source:
                shutil.copyfileobj(source, sink, 1 << 20)
    place = {"gguf_file": whole.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(whole.parent, **place)
    loaded = AutoModelForCausalLM.from_pretrained(whole.parent, dtype=torch.float32, **place)
    config = loaded.config
    del config.quantization_config  # the weights are plain fp32 now, and save_pretrained fails with it
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
