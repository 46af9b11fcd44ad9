"""What a model that is made from a checkpoint takes over from it: the files beside the weights, and the licence.

Sentence-Transformers, for example, keeps its pooling, normalisation, prompts and maximum length in such files. Base
model and licence are only what the checkpoint's own card, its config or its zoo entry states.
"""

from __future__ import annotations

import inspect
import json
import os
import pickle
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import (
    HfApi,
    errors,
    hf_hub_download,
    metadata_load,
    snapshot_download,
)
from safetensors.torch import save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file
from yaml import YAMLError  # type: ignore[import-untyped]

from permprune.checkpoints.record import RECORD
from permprune.errors import PermpruneError
from permprune.models.modality import POOLING, POOLINGS, TASK, pooling_asked, pooling_of
from permprune.system.files import write_json
from permprune.system.progress import log
from permprune.zoo.models import HUB_ID, MODELS, resolve_model

CARD = "README.md"

MODULES = "modules.json"
"""The file in which Sentence-Transformers lists the folders of the modules that follow the transformer."""

WEIGHTS = "*.safetensors *.bin *.pt *.pth *.ckpt *.h5 *.msgpack *.ot *.onnx* *.gguf *.tflite *.npz *.index.json"
"""Files of weights, in any format."""

CODE = "*.py *.pyc *.so *.pkl *.pickle *.joblib *.npy"
"""Files that are code, or that can run code when they are read."""

OWN = (RECORD, CARD, "report.html", "kv.json", "adapter_config.json")
"""Files that describe the weights beside them."""

PICKLED, STORED = "pytorch_model.bin", "model.safetensors"

FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The poolings by the flags of a Pooling module's config, in files of releases before `pooling_mode`."""


WRITING = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_PRETRAINING_MAPPING)
"""Classes with a head that predicts tokens, which embeddings do not need, by the classes of configs."""


def fetch_companions(hub_id: str) -> None:
    """Have what `copy_companions` copies of a hub id, and its card, in the cache, if the hub can be reached."""
    with suppress(OSError, errors.HTTPError):  # type: ignore[attr-defined] # the model loads without them
        info = HfApi().model_info(hub_id)
        names = [file.rfilename for file in info.siblings or ()]
        listed = hf_hub_download(hub_id, MODULES, revision=info.sha) if MODULES in names else None
        chosen, _ = _choose(names, _modules(Path(listed)) if listed else [])
        for name in [*chosen, *({CARD} & {*names})]:
            hf_hub_download(hub_id, name, revision=info.sha)


def copy_companions(name: str, folder: Path) -> None:
    """Copy the files of a checkpoint that are not its weights into the folder of a model that was made from it.

    `name` is a zoo name, a folder or a hub id; of any other name there is nothing to copy. Files that `folder` has are
    kept. The modules of Sentence-Transformers are copied with their weights, pickled ones as safetensors. A warning
    names what is left out: code, pickles, links out of the checkpoint, and subfolders with other weights.
    """
    source = _folder_of(name)
    if source is None:
        return
    modules = _modules(source / MODULES)
    found = [path for path in sorted(source.rglob("*")) if path.is_file() or path.is_symlink()]
    files = [path.relative_to(source).as_posix() for path in found]
    chosen, left = _choose(files, modules)
    left = [file for file in left if not (folder / file).exists()]  # custom code that was trusted is there already
    for module in modules:
        (folder / module).mkdir(parents=True, exist_ok=True)  # also one without files
    for file in chosen:
        path, target = source / file, folder / file
        if target.exists():
            continue
        if not _is_inside(path, source) or not os.access(path, os.R_OK):
            left.append(file)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name != PICKLED:
            shutil.copyfile(path, target)
        elif f"{Path(file).parent}/{STORED}" not in files and not _convert(path, target.with_name(STORED)):
            left.append(file)
    if left:
        log.warning("not copied from %s, as it is code, a pickle, a link or other weights: %s", name, ", ".join(left))


def _folder_of(name: str) -> Path | None:
    """The folder of a checkpoint, in the cache if it is one of the zoo or the hub; None if there is none."""
    if name in MODELS:
        return Path(resolve_model(name))
    folder = Path(name) if name else None
    if HUB_ID.fullmatch(name) and not Path(name).is_dir():
        with suppress(OSError):  # it is not in the cache
            folder = Path(snapshot_download(name, local_files_only=True))
    return folder if folder and (folder / "config.json").is_file() else None


def _modules(path: Path) -> list[str]:
    """The subfolders that a list of modules names; none if it is missing or damaged."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        named = [str(module.get("path") or "") for module in json.loads(path.read_text(encoding="utf-8"))]
        relative = [name for name in named if name not in ("", ".") and not {"..", "/"} & {*PurePosixPath(name).parts}]
        return [name for name in relative if not (path.parent / name).is_symlink()]
    return []


def _choose(files: Iterable[str], modules: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files (relative paths) to copy, and those and the subfolders that are left out and have to be named."""
    chosen, left = [], []
    visible = [path for path in map(PurePosixPath, files) if not any(part.startswith(".") for part in path.parts)]
    inside = {path for path in visible if any(path.is_relative_to(module) for module in modules)}
    others = {path.parts[0] for path in visible if len(path.parts) > 1 and path not in inside and _is(path, WEIGHTS)}
    for path in visible:
        if path in inside and path.name in (PICKLED, STORED):
            chosen.append(str(path))
        elif _is(path, CODE):
            left.append(str(path))
        elif str(path) not in OWN and not _is(path, WEIGHTS) and (path in inside or path.parts[0] not in others):
            chosen.append(str(path))
    return chosen, [*left, *sorted(others)]


def _is(path: PurePosixPath, patterns: str) -> bool:
    return any(fnmatch(path.name.lower(), pattern) for pattern in patterns.split())


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file is in the folder, or, as a link, in the blobs of the hub's cache that the folder is in."""
    real, home = path.resolve(), folder.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    return real.is_file() and (real.is_relative_to(home) or real.is_relative_to(blobs))


def _convert(path: Path, target: Path) -> bool:
    """Write a pickle of plain tensors as safetensors; returns whether it is one."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, target)
    except (pickle.UnpicklingError, RuntimeError, AttributeError, EOFError, ValueError):
        return False
    return True


def base_model_of(model: PreTrainedModel, name: str) -> str | None:
    """Return the hub id that a model was read by; None for a folder, a zoo model, or one that was never read."""
    unread = name == type(model).__name__
    return name if HUB_ID.fullmatch(name) and not (unread or name in MODELS or Path(name).exists()) else None


def licence_of(name: str) -> str | None:
    """Return the licence that a model's card or config.json states, as the hub spells it; None if neither does.

    `name` is a zoo name, a folder or a hub id. The card of a hub id is the one in the cache; no request is made.
    """
    stated: object = None
    if name in MODELS:
        stated = MODELS[name].license
    elif folder := _folder_of(name):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))  # the model was loaded with it
        stated = _card_licence(folder / CARD) or (config.get("license") if isinstance(config, dict) else None)
    return stated.lower() if isinstance(stated, str) else None


def _card_licence(path: Path) -> object:
    try:
        return (metadata_load(path) or {}).get("license") if path.is_file() else None
    except (OSError, ValueError, YAMLError) as error:
        log.warning("%s: its metadata cannot be read, so its licence is not known (%s)", path, error)
        return None


def encoder_class(
    architecture: type[PreTrainedModel], config: PreTrainedConfig, *, name: str, source: str | Path, task: str | None
) -> type[PreTrainedModel]:
    """Return the class of a checkpoint as a sentence encoder, and name its pooling in the config.

    The pooling is the one that the `task` asks for (`pooling_asked`), or that of the config, or of the files of
    Sentence-Transformers; `source` is a folder or a hub id. A head that predicts tokens is left out, and with a `task`
    any other. `architecture` is returned unchanged for a checkpoint that is no sentence encoder. Raises
    `PermpruneError` for a pooling that is not known, or other than the one asked for.
    """
    asked, named = pooling_asked(task), getattr(config, POOLING, None)
    headless = "labels" not in inspect.signature(architecture.forward).parameters
    heads: list[object] = [mapping.get(type(config), None) for mapping in WRITING]
    writes = architecture in heads
    if asked is None and not (headless or writes):
        return architecture
    pooling = named or _pooling_at(name, source)
    if pooling is not None and not (isinstance(pooling, str) and pooling in POOLINGS):
        raise PermpruneError(
            f"{name} pools tokens in a way that is not known ({pooling!s:.40}): give an encoder with one of "
            f"{', '.join(POOLINGS)}"
        )
    if asked is not None and not (asked or pooling):
        choices = ", ".join(f"{TASK}:pooling={known}" for known in POOLINGS)
        raise PermpruneError(f"the pooling of {name} is not known: give as its task one of {choices}")
    if asked and pooling not in (None, asked):
        raise PermpruneError(f"{name} pools its tokens by {pooling}, not {asked}: ask for the task {TASK} alone")
    if not (pooling or asked):
        return architecture
    setattr(config, POOLING, pooling or asked)
    encoder = MODEL_MAPPING.get(type(config), None)
    return architecture if headless or not isinstance(encoder, type) else encoder


def write_modules(model: PreTrainedModel, folder: Path) -> None:
    """Write the pooling of a sentence encoder, and the normalisation, as modules of Sentence-Transformers.

    A folder that lists modules is left as it is.
    """
    pooling = pooling_of(model)
    if pooling is None or (folder / MODULES).exists():
        return
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    for path in filter(None, kinds):
        (folder / path).mkdir(exist_ok=True)
    flags = {flag: mode == pooling for flag, mode in FLAGS.items()}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": model.config.hidden_size, **flags})
    write_json(folder / MODULES, modules)


def _pooling_at(name: str, source: str | Path) -> object:
    """What the files of a checkpoint call its pooling; None if they say that it is no sentence encoder.

    Modules other than the pooling and the normalisation are left out of what is compared, with a warning.
    """
    if name in MODELS:
        return MODELS[name].pooling
    modules = _read(source, MODULES)
    if not isinstance(modules, list):
        return None
    kinds = {str(module.get("type", "")).rpartition(".")[2]: module for module in modules if isinstance(module, dict)}
    if others := sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"}):
        log.warning("%s: embeddings are compared before its modules %s", name, ", ".join(others))
    if "Pooling" not in kinds:
        return None
    config = _read(source, f"{kinds['Pooling'].get('path')}/config.json") or {}
    named = config.get("pooling_mode") or [mode for flag, mode in FLAGS.items() if config.get(flag)]
    pooling = named[0] if isinstance(named, list) and len(named) == 1 else named
    return pooling or "none"


def _read(source: str | Path, file: str) -> Any:
    """The JSON of a file of a folder or hub id; None if there is no such file."""
    path = cached_file(
        source, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    try:
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PermpruneError(f"{path} is damaged ({error}): copy it again") from error
