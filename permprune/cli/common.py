"""The application, its options that several commands share, and how errors reach a person.

Only what the options need is imported at the top of these modules, and what a command does inside its function: help
takes no torch and no transformers, which are seconds to import.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from permprune.config import PruneConfig
from permprune.errors import PermpruneError
from permprune.system.interrupts import interruptible
from permprune.system.progress import console, log

if TYPE_CHECKING:
    from permprune.evaluation.lm_tasks import TaskList

app = typer.Typer(
    help="Learns channel permutations so that N:M pruning of a Transformer loses less.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Model = Annotated[str, typer.Argument(help="a zoo name (smollm2-135m), a folder, or a hub id")]
Data = Annotated[
    str | None,
    typer.Option(help="text (file, .jsonl), images, speech or sentences to evaluate on, or a data set id"),
]
Windows = Annotated[int, typer.Option(help="windows of text to evaluate on; an image counts 1/32")]
Length = Annotated[int, typer.Option(help="tokens in a window")]
Metric = Annotated[
    str | None,
    typer.Option(help="of labels: accuracy, matthews, f1, pearson, spearman; accuracy of classes, else pearson"),
]
Tasks = Annotated[str, typer.Option(help="tasks of lm-eval, and wikitext2, separated by commas (docs/tasks.md)")]
TaskFile = Annotated[
    list[str] | None,
    typer.Option(help="lm-eval's YAML of a task or group; runs the code that it names; may be repeated"),
]
TaskData = Annotated[str | None, typer.Option(help="folder with files of the tasks; the hub if absent")]
Limit = Annotated[int | None, typer.Option(help="examples of each task; all if absent")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python code that comes with the model, where it needs that")
]
Json = Annotated[Path | None, typer.Option("--json", help="write the figures to this file")]

WRITTEN = ("json", "picture")
"""Parameters that name files to write."""

METHODS = (
    "one of none, random, ria, cp, permllm, reconstruction, learned-paper, learned, newton, with options after it, as "
    "newton:rounds=6"
)

UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def _print_version(wanted: bool) -> None:
    if wanted:
        print(importlib.metadata.version("permprune"))
        raise typer.Exit


@app.callback()
def main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="log each decision")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version, and end")
    ] = False,
) -> None:
    handler = RichHandler(console=console, show_path=False, show_level=False, markup=False)
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if verbose else logging.WARNING)


def prune_config(
    pattern: Annotated[
        str,
        typer.Option(help="N of every M consecutive weights survive; mixed: a pattern for each layer", metavar="N:M"),
    ] = PruneConfig.pattern,
    saliency: Annotated[str, typer.Option(help="one of magnitude, wanda, ria, obs")] = "wanda",
    mode: Annotated[
        str, typer.Option(help="fold: no run-time cost; gather: one index_select at each norm, loses less")
    ] = PruneConfig.mode,
    update: Annotated[
        str,
        typer.Option(
            help="none: masks alone; sparsegpt: its own masks, and the weights that stay make up for the others"
        ),
    ] = "none",
    calibration: Annotated[
        str | None,
        typer.Option(help="text (file, .jsonl), images, speech, sentences, or a data set id; the default if absent"),
    ] = PruneConfig.calibration,
    samples: Annotated[
        int, typer.Option(help="windows of calibration text; an image counts 1/8")
    ] = PruneConfig.samples,
    length: Length = PruneConfig.length,
    seed: Annotated[int, typer.Option(help="the same seed gives the same permutations")] = PruneConfig.seed,
    precision: Annotated[
        str, typer.Option(help="of activations in the search: auto, fp32 or bf16")
    ] = PruneConfig.precision,
    memory: Annotated[
        str | None, typer.Option(help="bound on tensors, as 8GiB: prune reads a model that needs more layer by layer")
    ] = None,
    batch: Annotated[
        int, typer.Option(help="calibration examples at a time: fewer need less memory")
    ] = PruneConfig.batch,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="recompute activations in the backward pass: slower, less memory")
    ] = PruneConfig.recompute,
    minutes: Annotated[
        float | None, typer.Option(help="end the search after so long (the result then varies)")
    ] = PruneConfig.minutes,
    exclude: Annotated[list[str] | None, typer.Option(help="glob of layers that stay dense; may be repeated")] = None,
    trust_remote_code: TrustRemoteCode = PruneConfig.trust_remote_code,
) -> PruneConfig:
    """The options of every command that prunes."""
    return PruneConfig(
        pattern=pattern,
        saliency=saliency,
        mode=mode,
        update=update,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        precision=precision,
        memory=parse_bytes(memory),
        batch=batch,
        recompute=recompute,
        minutes=minutes,
        exclude=tuple(exclude or ()),
        trust_remote_code=trust_remote_code,
    )


def command(function: Callable[..., Any], without: Iterable[str] = ()) -> Callable[..., Any]:
    """Register a command; errors for people become one line on stderr and exit status 2, Ctrl-C status 130.

    A parameter annotated `PruneConfig` stands for the options of `prune_config`, less those `without`.
    """
    own = inspect.signature(function, eval_str=True).parameters
    every = inspect.signature(prune_config, eval_str=True).parameters
    shared = {name: parameter for name, parameter in every.items() if name not in without}
    place = next((name for name, parameter in own.items() if parameter.annotation is PruneConfig), "")
    parameters = own.keys() | shared.keys() if place else own.keys()

    @wraps(function)
    def run(**options: Any) -> None:
        from permprune.jobs import trials  # noqa: F401 - with it nearly all that a command imports
        from permprune.system import distributed
        from permprune.system.files import WorkFolder, require_writable
        from permprune.system.memory import keep_freed_memory
        from permprune.system.out_of_memory import OutOfMemory

        _quiet_libraries()
        keep_freed_memory()
        with interruptible(), distributed.processes(), _speaking(distributed.rank() == 0):
            try:
                _require_text(options)
                if place:
                    options[place] = prune_config(**{name: options.pop(name) for name in shared})
                for path in (options.get(name) for name in WRITTEN):
                    if path is not None:
                        require_writable(path)  # before hours of work, not after
                function(**options)
            except PermpruneError as error:
                said = OutOfMemory(error.peak, parameters) if isinstance(error, OutOfMemory) else error
                print(f"permprune: {said}", file=sys.stderr)
                raise typer.Exit(2) from None
            except KeyboardInterrupt:
                kept = "resume" in options and WorkFolder(options["out"]).holds_state()
                hint = "; the same command with --resume goes on from what was found" if kept else ""
                print(f"permprune: interrupted{hint}", file=sys.stderr)
                raise typer.Exit(130) from None

    offered = [p for name, parameter in own.items() for p in (shared.values() if name == place else [parameter])]
    run.__signature__ = inspect.Signature(offered)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in offered}
    app.command()(run)
    return run


def _quiet_libraries() -> None:
    """Leave it to permprune to report what a person must know."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def _require_text(options: Mapping[str, Any]) -> None:
    """Raise `PermpruneError` for options that files cannot be named by or written with."""
    for name, given in options.items():
        for value in given if isinstance(given, list) else [given]:
            text = str(value)
            if "\0" in text or text != text.encode(errors="ignore").decode():
                raise PermpruneError(f"{name} holds a NUL character, or bytes that are not UTF-8: give text without")


@contextmanager
def _speaking(speaks: bool) -> Iterator[None]:
    """Of several processes one speaks; the others run the same command in silence."""
    if speaks:
        yield
        return
    console.quiet = True
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


def parse_bytes(text: str | None) -> int | None:
    """ "8GiB" in bytes. Raises `PermpruneError` for what is no finite amount above 0."""
    if text is None:
        return None
    number = text.rstrip("BGIKMbgikm")
    try:
        size = int(float(number) * UNITS[text[len(number) :].strip().upper()])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise PermpruneError(f'"{text}" is no amount of memory: give one above 0 as 8GiB or 500MB')
    return size


def parts(text: str) -> list[str]:
    """ "a, b" in its parts."""
    return [part.strip() for part in text.split(",") if part.strip()]


def task_list(
    names: str, files: list[str] | None, data: str | None, limit: int | None, few_shot: int | None = None
) -> TaskList | None:
    """The tasks that a person names; None for none."""
    from permprune.evaluation.lm_tasks import TaskList

    if not names and not files:
        return None
    return TaskList(tuple(parts(names)), data=data, limit=limit, few_shot=few_shot, files=tuple(files or ()))


def show(table: Table) -> None:
    """Print a table, as wide as it needs where the output is no terminal."""
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def write_figures(path: Path | None, figures: object) -> None:
    from permprune.system.files import write_json

    if path is not None:
        write_json(path, figures)
