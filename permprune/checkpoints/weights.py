"""Load a checkpoint, and raise an error unless it has every weight of the model in the right shape, and undamaged."""

from __future__ import annotations

import inspect
import json
import logging
import re
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from permprune.errors import PermpruneError, first_line
from permprune.system.progress import log

TRAINING_ONLY = re.compile(r"(^|\.)masked_spec_embed$")
"""Weights that a checkpoint may lack because inference does not use them (the SpecAugment vector of wav2vec 2.0)."""

OBSOLETE = re.compile(r"(^|\.)((attn|attention)\.(masked_)?bias|rotary_emb\.(inv_freq|cos_cached|sin_cached))$")
"""Tensors that a checkpoint may have in addition: constants that older releases of Transformers stored."""

POOLER = re.compile(r"(^|\.)pooler\.")

MANY_LAYERS = 1000
"""Number of layers that can be built without weights within seconds."""

SHOWN = 3
"""Maximum number of names in an error message."""

Shape = tuple[int, ...]

INDEX = "model.safetensors.index.json"

PICKLES = "pytorch_model*.bin"

GATHERED, PACKED_WEIGHTS = "gathered.safetensors", "packed.safetensors"
"""Files of the weights of a model with gathers, and of packed weights."""

CURES = {
    GATHERED: "these weights reorder channels at run time - load them with permprune.load",
    PACKED_WEIGHTS: "these weights are packed - import permprune before you load them",
}
"""The text in place of a file's name in the error that plain Transformers raises."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model, and how they are read.

    `name` is the model's name in messages, `source` a folder or a hub id, and `architecture` and `config` what its
    config.json says. Custom code of the checkpoint runs only with `trust_remote_code`.
    """

    name: str
    source: str | Path
    architecture: type[PreTrainedModel]
    config: PreTrainedConfig
    trust_remote_code: bool = False

    def load(self, **options: Any) -> PreTrainedModel:
        """Load the model with `from_pretrained` after checking that the checkpoint has all of its weights.

        `options` are passed to `from_pretrained`. Logs a warning if modules of the checkpoint are left out because the
        model does not have them. Raises `PermpruneError` if the weights do not match (see `_require_fit`);
        errors from Transformers are not caught.
        """
        skeleton, options, left_out = self._checked_skeleton(options)
        if left_out:
            log.warning("%s: a %s has no place for %s, left out", self.name, type(skeleton).__name__, _named(left_out))
        model: PreTrainedModel = self._from_pretrained(**options).eval()
        return model

    def load_on(self, device: torch.device) -> PreTrainedModel:
        """Like `load`, tensor by tensor to a device, unless they are packed: the host holds only a few at a time."""
        if device.type == "cpu" or getattr(self.config, "quantization_config", None) is not None:
            return self.load()
        return self.load(device_map={"": device})

    def skeleton(self) -> PreTrainedModel:
        """Load the model on the meta device, reading only the names and shapes of its weights.

        Raises the same errors as `load`.
        """
        return self._checked_skeleton({})[0]

    def load_file(self, path: Path) -> PreTrainedModel:
        """Like `load`, from a single safetensors file with the weights under the names of the model's state dict.

        Raises `PermpruneError` if the weights do not match; errors from safetensors are not caught.
        """
        with safe_open(path, "pt") as file:
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
        pooler = {} if any(map(POOLER.search, stored)) else _without_pooler(self.architecture)
        dtype = self.config.dtype or torch.float32
        model: PreTrainedModel = self.architecture._from_config(self.config, dtype=dtype, **pooler).eval()
        expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        shapes = {key: (shape, expected[key]) for key, shape in stored.items() if expected.get(key, shape) != shape}
        missing, unexpected = ((), ()) if shapes else load_model(model, path, strict=False)
        _require_fit(str(path), model, missing, unexpected, shapes)
        return model

    def without_weights(self) -> tuple[PreTrainedModel, torch.dtype]:
        """Build the model on the meta device from its config alone; returns it and the type that its weights have."""
        with torch.device("meta"):
            model: PreTrainedModel = self.architecture._from_config(self.config)
        dtype = model.dtype
        model.to("meta")  # type: ignore[arg-type]  # some parameters are created on the CPU whatever the default device
        return model.eval(), dtype

    def _checked_skeleton(self, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any], list[str]]:
        """Return the skeleton, the options with which `load` loads the model, and the tensors that are left out.

        If the checkpoint lacks the model's pooler (in BERT, ViT and others), the model is built without it, since its
        weights would be random.
        """
        model, info = self._dry_run(options)
        if any(map(POOLER.search, info["missing_keys"])) and (pooler := _without_pooler(self.architecture)):
            options = {**options, **pooler}
            model, info = self._dry_run(options)
        shapes = {key: (tuple(stored), tuple(expected)) for key, stored, expected in info["mismatched_keys"]}
        return model, options, _require_fit(self.name, model, info["missing_keys"], info["unexpected_keys"], shapes)

    def _dry_run(self, options: Mapping[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Load the model on the meta device; returns it and what Transformers says of its checkpoint."""
        dry = {"device_map": {"": "meta"}, "output_loading_info": True, "ignore_mismatched_sizes": True}
        with _report() as lines:
            try:
                return self._from_pretrained(**{**options, **dry})  # type: ignore[no-any-return]
            except RuntimeError as error:
                if "CONVERSION" not in str(error):
                    raise
                fused = [line.split("|")[0].strip() for line in lines if "| CONVERSION" in line]
                raise PermpruneError(
                    f"{self.name} does not load: the checkpoint lacks parts of {_named(fused)}, or they differ in shape"
                ) from error

    def _from_pretrained(self, **options: Any) -> Any:
        given = {"config": self.config, "dtype": "auto", "trust_remote_code": self.trust_remote_code}
        # Kernels of the Hub are downloaded, and neither traced on the meta device nor differentiated twice.
        return self.architecture.from_pretrained(self.source, **{**given, "use_kernels": False, **options})


def _require_fit(
    name: str,
    model: nn.Module,
    missing: Iterable[str],
    unexpected: Iterable[str],
    shapes: Mapping[str, tuple[Shape, Shape]],
) -> list[str]:
    """Raise `PermpruneError` if the weights of a checkpoint are not the model's; the message names the first few.

    `missing` are the names of weights that only the model has, `unexpected` those that only the checkpoint has, and
    `shapes` maps names to (shape in the checkpoint, shape in the model) where the two differ. Allowed are tensors that
    inference does not use, and whole modules that only the checkpoint has, such as a head or another tower, if they are
    not within the repeated blocks; the names of their tensors are returned. `name` is the checkpoint's in the message.
    """
    missing = sorted((key for key in missing if not TRAINING_ONLY.search(key)), key=_numbered)
    unexpected = sorted((key for key in unexpected if not OBSOLETE.search(key)), key=_numbered)
    modules = {_pattern(module) for module, _ in model.named_modules()}
    left_out = [key for key in unexpected if _is_apart(key, modules)]
    faults = []
    if missing:
        faults.append(f"the checkpoint lacks {_named(missing)}")
    if shapes:
        shown = [f"{key} {shapes[key][0]} instead of {shapes[key][1]}" for key in sorted(shapes, key=_numbered)]
        faults.append(f"the checkpoint has other shapes than config.json for {_named(shown)}")
    if others := [key for key in unexpected if key not in left_out]:
        faults.append(f"the {type(model).__name__} of config.json has no place for {_named(others)}")
    if faults:
        raise PermpruneError(f"{name} does not load: {'; '.join(faults)}")
    return left_out


def require_buildable(config: PreTrainedConfig, source: str | Path | None = None) -> None:
    """Raise `ValueError` if a config has more than `MANY_LAYERS` layers, and more than the checkpoint has tensors.

    Such a config is damaged, and building its model to find the missing weights would take hours. Without the folder
    `source` of the checkpoint, the config is all that there is.
    """
    stored = 0
    for path in [] if source is None else Path(source).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored += len(file.keys())
    for name, number in _integers(config.to_dict()):
        if "layers" in name and number > max(stored, MANY_LAYERS) and (stored or source is None):
            raise ValueError(f"{name} is {number}" + (f", and the checkpoint holds {stored} tensors" if stored else ""))


def _integers(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield (name, value) for every integer in a nested mapping."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _integers(value)
        elif isinstance(value, int):
            yield name, value


def _without_pooler(architecture: type[nn.Module]) -> dict[str, bool]:
    """The keyword argument that builds `architecture` without its pooler; empty if it has no such argument."""
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(architecture).parameters else {}


@contextmanager
def _report() -> Iterator[list[str]]:
    """Context manager that captures the lines of Transformers' loading report instead of showing them."""
    lines: list[str] = []
    logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        lines.extend(record.getMessage().splitlines())
        return False

    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addFilter(keep)
    try:
        with warnings.catch_warnings(action="ignore"):  # the actual loading repeats them
            yield lines
    finally:
        logger.removeFilter(keep)
        logger.setLevel(level)


def _named(names: Sequence[str]) -> str:
    """Format names for a message: "a", or "5 weights (a, b, c and 2 more)"."""
    if len(names) == 1:
        return names[0]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} weights ({', '.join(names[:SHOWN])}{more})"


def _numbered(name: str) -> list[str | int]:
    """Sort key for natural order: layers.2 before layers.10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _pattern(name: str) -> str:
    """Replace numbers in a dotted name: "layers.0.mlp" becomes "layers.*.mlp"."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _is_apart(key: str, modules: Container[str]) -> bool:
    """Whether a tensor belongs to a module that the model does not have, outside its numbered blocks.

    `modules` are the names of the model's modules as made by `_pattern`.
    """
    path = _pattern(key).split(".")[:-1]
    above = [".".join(path[:end]) for end in range(1, len(path) + 1)]
    return not any(part in modules and (part is above[-1] or part.endswith("*")) for part in above)


def damage(source: str | Path, weights: bool = False) -> str | None:
    """Describe the first damaged file in a checkpoint's folder, as a clause for an error message; None if all are fine.

    Called after loading has failed, because the error from Transformers may not name the file. With `weights`, the
    weights failed to load, and pickled weights are reported as the cause. Nothing is unpickled here.
    """
    folder = Path(source)
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            return f"{path.name} is not valid JSON ({first_line(error)})"
        if path.name.endswith("config.json") and not isinstance(content, dict):
            return f"{path.name} is not a JSON object"
        if path.name == INDEX and (fault := _index_damage(content, folder)):
            return fault
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{path.name} is damaged ({first_line(error).removeprefix('Error while deserializing header: ')})"
    pickles = [] if any(folder.glob("model*.safetensors")) else sorted(folder.glob(PICKLES))
    if weights and pickles:
        return (
            f"{pickles[0].name} contains pickled weights, which can run code, so only plain, intact tensors are read: "
            "convert it to safetensors"
        )
    return None


def _index_damage(content: Any, folder: Path) -> str | None:
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        return f"{INDEX} names no files of weights"
    absent = [file for file in dict.fromkeys(files.values()) if not (folder / file).is_file()]
    return f"{INDEX} names {absent[0]}, which is absent" if absent else None


def stop_transformers(folder: Path, weights: str) -> None:
    """Let `from_pretrained` of plain Transformers stop with an error that names the cure for these weights (`CURES`).

    The folder's config names the cure as the file of weights, which does not exist.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["transformers_weights"] = f"{CURES[weights]}.safetensors"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
