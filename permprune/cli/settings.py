"""Options of the command line from the fields of settings, whose docstrings are the help."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from permprune.errors import PermpruneError
from permprune.options import Number, nearest, parse_bytes

T = TypeVar("T")
N = TypeVar("N", int, float)

NAMED = dict.fromkeys(("Permuter", "ScorePermuter", "Saliency", "Update", "Training", "ModelSource", "Pattern"), str)
"""Types of objects of which the command line takes the name; they are not imported for that."""

RENAMED = {
    ("Evaluation", "source"): "data",
    ("Evaluation", "shown"): "examples",
    ("TaskList", "names"): "tasks",
    ("TaskList", "files"): "task_file",
    ("KVSearch", "budget"): "bytes",
}
"""Options that have another name than the field."""

PYTHON_ONLY = ("measured", "held_out", "shared", "packed", "packed_head")
"""Fields that are no options."""

RARE = (
    "saliency", "seed", "minutes", "exclude", "task", "metric", "examples", "batch", "recompute", "precision",
    "offload", "shard",
)  # fmt: skip
"""The settings of a run that few people need: commands of runs take them by `--set`, as in --set batch=1."""

PANELS = {
    "A mix of patterns": ("candidates", "keep", "bytes", "max_loss"),
    "Data": ("samples", "length", "windows", "metric", "seed"),
    "Tasks": ("tasks", "task_file", "limit"),
    "Model and output": ("memory", "set", "task", "trust_remote_code", "pack", "head", "json"),
}
"""Options that few people need, by their panel in the help."""

NAMES = {
    **dict.fromkeys(("model", "teacher", "dense"), "zoo.models:MODELS"),
    **dict.fromkeys(("order", "methods"), "permuters.registry:PERMUTERS"),
    "saliency": "saliency.metrics:SALIENCIES",
    "update": "updates.methods:UPDATES",
    "effort": "config:EFFORTS",
    "mode": "options:MODES",
    "precision": "config:PRECISIONS",
}
"""The module and the variable with the names that an option or argument may have; the Tab key completes them."""


def parts(text: str) -> tuple[str, ...]:
    """Split a list such as "a, b" at its commas; empty parts are left out."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers_in(option: str, text: str, kind: type[N]) -> list[N]:
    """Parse a list of numbers, such as "5,20". Raises `PermpruneError` for anything else."""
    try:
        return [kind(part) for part in parts(text)]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise PermpruneError(f'--{option} is "{text}": give {what}, separated by commas') from None


def parse_size(text: str) -> float:
    """Parse the size of a model: bytes such as "90MB", or a share such as "0.5". Raises `PermpruneError`."""
    if re.fullmatch(r"\s*(1|1\.0*|0?\.\d+)\s*", text):
        return float(text)
    return parse_bytes(text)


def parse_loss(text: str) -> float:
    """Parse a share such as "1%" or "0.01". Raises `PermpruneError` for anything else."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*", text)
    if match is None:
        raise PermpruneError(f'--max-loss is "{text}": give a share of the dense model\'s value, such as 1%')
    return float(match[1]) / (100 if match[2] else 1)


PARSERS: dict[str, Callable[[str], Any]] = {
    "memory": parse_bytes,
    "names": parts,
    "candidates": parts,
    "bytes": parse_size,
    "max_loss": parse_loss,
}
"""Functions that read the text of an option, by the name of its field."""


def option(settings: type, name: str, *flags: str, **more: Any) -> Any:
    """Return a typer option whose help is the first paragraph of the docstring of a field."""
    text = _field_docs(settings)[name].replace("`", "").rstrip(".")
    lowered = text if text[:2].isupper() or text[1] == ":" else text[0].lower() + text[1:]
    return typer.Option(*flags, help=lowered, metavar="N:M" if name in ("pattern", "keys", "values") else None, **more)


def options_of(settings: type, without: Collection[str] = ()) -> dict[str, inspect.Parameter]:
    """Return a parameter of a command for each field of settings, but for the options in `without`, by name.

    It is None if the option is not given and the field's default is no plain value.
    """
    hints, parameters = get_type_hints(settings, localns=NAMED), {}
    for name, field in _options(settings).items():
        if name not in without:
            default = field.default if isinstance(field.default, bool | int | float | str) else None
            kind = _option_type(field.name, hints[field.name])
            flags = [f"--{name.replace('_', '-')}"] if default is False else []  # without one for the opposite
            offered = option(settings, field.name, *flags)
            if get_origin(kind) is list:
                offered.help += "; may be repeated"
            annotation: Any = Annotated[kind if default is not None else kind | None, offered]
            parameters[name] = inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
    return parameters


def set_options(settings: Iterable[type], texts: Iterable[str], without: Collection[str] = ()) -> dict[str, Any]:
    """Return the values of texts such as "batch=1", by option; those of the `settings` but for those in `without`.

    Of several values of one option that takes one, the last counts. Raises `PermpruneError` for an unknown option.
    """
    values = dict[str, Any]()
    hints = {
        name: (field.name, get_type_hints(kind, localns=NAMED, include_extras=True)[field.name])
        for kind in settings
        for name, field in _options(kind).items()
        if name in RARE and name not in without
    }
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in hints:
            raise PermpruneError(f"--set {text}: {nearest(name, hints)}")
        if not equals:
            raise PermpruneError(f"--set {text}: give its value, as in --set {name}=...")
        field, hint = hints[name]
        number = Number.of(hint)
        if number is None and _option_type(field, hint) == list[str]:
            values[name] = [*values.get(name, []), value]
        else:
            values[name] = value if number is None else number.from_text(value)
            if number is not None:
                number.require(name, values[name])
    return values


def complete_option(name: str, parameter: inspect.Parameter) -> None:
    """Give the option of a command its panel in the help, and its completion by the Tab key."""
    info = parameter.annotation.__metadata__[-1]
    info.rich_help_panel = next((panel for panel, names in PANELS.items() if name in names), None)
    module, _, registry = NAMES.get(name, "").partition(":")

    def complete(incomplete: str) -> list[str]:
        before = "".join(incomplete.rpartition(",")[:2])  # a list of names
        return [before + known for known in getattr(importlib.import_module(f"permprune.{module}"), registry)]

    info.autocompletion = complete if module else None


def settings_from(settings: type[T], values: Mapping[str, Any]) -> T:
    """Return the settings for the values of their options. Raises `PermpruneError` for those that they refuse."""
    given = dict[str, Any]()
    for name, field in _options(settings).items():
        if (value := values.get(name)) not in (None, []):
            plain = tuple(value) if isinstance(value, list) else value
            given[field.name] = PARSERS[field.name](value) if field.name in PARSERS else plain
    return settings(**given)


def _options(settings: type) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields that are options, by the names of these."""
    fields = [field for field in dataclasses.fields(settings) if field.init and field.name not in PYTHON_ONLY]
    return {RENAMED.get((settings.__name__, field.name), field.name): field for field in fields}


def _option_type(name: str, hint: Any) -> Any:
    """The type of the option of a field: text where it is parsed here, a list for a field that takes several texts."""
    kinds = get_args(hint) or (hint,)
    if name in PARSERS:
        return str
    if any(get_origin(kind) in (tuple, Sequence) for kind in (hint, *kinds)):
        return list[str]
    return next(kind for kind in kinds if kind in (bool, int, float, str))


@cache
def _field_docs(settings: type) -> dict[str, str]:
    """Return the first paragraph of the docstring of each field of a dataclass, on one line."""
    module = ast.parse(inspect.getsource(sys.modules[settings.__module__]))
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    return {
        field.target.id: " ".join(doc.value.value.partition("\n\n")[0].split())
        for field, doc in pairwise(classes[settings.__name__].body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    }
