"""The application, the options that several commands share, and the reporting of errors.

The modules of this package import at the top only what their options need. A command is a generator: up to its `yield`
it makes its settings, by modules that do not import torch or transformers, which takes seconds; after it, it runs.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.logging import RichHandler

import permprune
from permprune.cli.checks import STDOUT, require_files, require_text
from permprune.cli.settings import RARE, complete_option, option, options_of, set_options, settings_from
from permprune.config import PruneConfig
from permprune.errors import PermpruneError
from permprune.options import Number
from permprune.system.failures import interruptible
from permprune.system.imports import called_later
from permprune.system.progress import console, log, quiet_libraries, working


class Program(typer.core.TyperGroup):
    """The commands; wrong usage is one line on stderr and exit status 2."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        if "--help" in sys.argv:  # Markdown and tracebacks, which it does not show, would be a fourth of its time
            with called_later("rich.markdown", "Markdown"), called_later("rich.traceback", "Traceback"):
                importlib.import_module("typer.rich_utils")
        try:
            sys.exit(super().main(*arguments, **{**options, "standalone_mode": False}) or 0)
        except USAGE as error:
            if line := _usage(error):
                print(f"permprune: {line}", file=sys.stderr)
            sys.exit(2)


USAGE: Any = typer.BadParameter.__base__
"""click's error for wrong usage, of click itself or of the copy in typer."""


def _usage(error: Any) -> str:
    """Return the line for an error of click, with the closest option that there is; empty if it is the help."""
    place = error.ctx.command_path if error.ctx else "permprune"
    wrong = getattr(error, "option_name", None)
    if wrong is None or not hasattr(error, "possibilities"):
        text = error.format_message().rstrip(".")
        if not text:  # help, which is printed
            return ""
        text = f"{text[:1].lower()}{text[1:]}".replace(". Did", ": did")
        return text if text.endswith("?") else f"{text}: see {place} --help"
    known = [name for parameter in error.ctx.command.params for name in (*parameter.opts, *parameter.secondary_opts)]
    if "--set" in known and (name := wrong.lstrip("-").replace("-", "_")) in RARE:
        return f"no option {wrong}: give --set {name}=VALUE"
    close = get_close_matches(wrong, known, 1)
    return f"no option {wrong}: " + (f'did you mean "{close[0]}"?' if close else f"see {place} --help")


app = typer.Typer(
    cls=Program,
    help="Learns channel permutations so that N:M pruning of a Transformer loses less.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="a zoo name such as smollm2-135m, a folder, or a hub id")]
Folder = Annotated[Path, typer.Argument(help="a folder that permprune wrote")]
Methods = Annotated[
    str, typer.Option(help="searches, separated by commas, with options as in newton:rounds=6 (see permprune methods)")
]
TrustRemoteCode = Annotated[bool, option(PruneConfig, "trust_remote_code", "--trust-remote-code")]
Task = Annotated[str | None, option(PruneConfig, "task", "--task")]
Resume = Annotated[bool, typer.Option("--resume", help="continue an interrupted run")]
Pack = Annotated[
    str | None,
    typer.Option(
        help="write packed weights as fp32, bf16, fp16, int8 or int4 (see permprune pack)",
        show_default="not packed, with zeros",
    ),
]
Head = Annotated[
    str | None,
    typer.Option(
        help="int8 packs the embedding and the head of a language model as int8 too",
        show_default="a floating-point type",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help=f"another setting of the run, such as batch=1; may be repeated: {', '.join(RARE)}",
    ),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="write the results to this JSON file; - is stdout, and tables then go to stderr"),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(permprune.__version__)
        raise typer.Exit


@app.callback()
def main(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="log each step of the search, for runs without a terminal")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    handler = RichHandler(console=console, show_path=False, show_level=False, markup=False)
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if verbose else logging.WARNING)


def command(function: Callable[..., Iterator[None] | None], without: Collection[str] = ()) -> Callable[..., Any]:
    """Register a command; `PermpruneError` becomes one line on stderr and status 2, Ctrl-C status 130, SIGTERM 143.

    A parameter whose type is a dataclass stands for the options of its fields (`options_of`), except for those in
    `without`; several may share an option. A command with a `PruneConfig` takes `RARE` ones by --set. Numbers have to
    be in the range of their type, such as `Count`. Before anything slow is imported, the function runs up to its
    `yield`, and its inputs and outputs are looked for. A function without one has then done its work.
    """
    arguments = inspect.signature(function, eval_str=True).parameters
    parameters, settings = dict[str, inspect.Parameter](), dict[str, tuple[type, Collection[str]]]()
    sets = any(parameter.annotation is PruneConfig for parameter in arguments.values())
    for name, parameter in arguments.items():
        offered = {name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)}
        kind = parameter.annotation
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            offered = options_of(kind, (*without, *(RARE if sets else ())))
            settings[name] = kind, offered.keys()
        parameters |= offered
    if sets:
        parameters["set"] = inspect.Parameter("set", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Set)
    for name, parameter in parameters.items():
        complete_option(name, parameter)
    hints = {name: parameter.annotation for name, parameter in parameters.items()}

    @wraps(function)
    def run(**given: Any) -> None:
        streamed = given.get("json") in STDOUT
        values = {**given, "json": sys.stdout if _is_first() else None} if streamed else {**given}
        with redirect_stdout(sys.stderr if streamed else sys.stdout):
            with _speaking(_is_first()), _reported(given):
                require_text(given)
                if streamed and values["json"] is None and _is_first():
                    raise PermpruneError("stdout is closed: give --json a file")
                rare = set_options([kind for kind, _ in settings.values()], given.get("set") or (), without)
                for name, (kind, offered) in settings.items():
                    values[name] = settings_from(kind, {**{option: given[option] for option in offered}, **rare})
                for name, hint in hints.items():
                    number = Number.of(hint) or Number.of(hint.__origin__)
                    if number is not None:
                        number.require(name, given[name])
                work = function(**{name: values[name] for name in arguments})
                if work is not None:
                    next(work, None)
                    require_files(given)
            if work is not None:
                _finish(function.__name__, work, given)

    run.__signature__ = inspect.Signature([*parameters.values()])  # type: ignore[attr-defined]
    run.__annotations__ = hints
    app.command()(run)
    return run


def _finish(name: str, work: Iterator[None], given: Mapping[str, Any]) -> None:
    """Import what is slow, and run the command of this name to its end."""
    with _speaking(_is_first()), working(f"{name}: importing PyTorch"):
        log.info("importing PyTorch")
        from permprune.engine import held  # noqa: F401 - with it nearly all that a command imports
        from permprune.system import distributed
        from permprune.system.memory import keep_freed_memory

    quiet_libraries()
    keep_freed_memory()
    with interruptible(), distributed.processes(), _speaking(distributed.rank() == 0), _reported(given):
        try:
            with working(name):
                next(work, None)
        except KeyboardInterrupt as interrupt:
            from permprune.system.files import WorkFolder

            kept = "resume" in given and given["out"] is not None and WorkFolder(given["out"]).holds_state()
            hint = "; repeat the command with --resume to continue" if kept else ""
            print(f"permprune: interrupted{hint}", file=sys.stderr)
            raise typer.Exit(128 + (interrupt.args or (signal.SIGINT,))[0]) from None


def _is_first() -> bool:
    """Whether this is the first process that `torchrun` starts, or the only one; before PyTorch is imported."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


@contextmanager
def _reported(parameters: Collection[str]) -> Iterator[None]:
    """A context that prints a `PermpruneError` in one line and exits with status 2."""
    try:
        yield
    except PermpruneError as error:
        from permprune.system.failures import OutOfMemory

        message = OutOfMemory(error.peak, parameters) if isinstance(error, OutOfMemory) else error
        print(f"permprune: {message}", file=sys.stderr)
        raise typer.Exit(2) from None


@contextmanager
def _speaking(speaks: bool) -> Iterator[None]:
    """Suppress all output unless `speaks`: of several processes only one writes to the terminal."""
    if speaks:
        yield
        return
    console.quiet = True
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


def show(*tables: RenderableType) -> None:
    """Print tables, as wide as they need if the output is not a terminal."""
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for table in tables:
        console.print(table)


def show_written(folder: Path) -> None:
    """Print the examples and the figures of a run, and what to do with the folder that it wrote."""
    from permprune.checkpoints.record import read_record
    from permprune.report.card import next_steps
    from permprune.report.showcase import examples_shown, side_table, titles
    from permprune.system import distributed

    if distributed.rank():  # its machine may not have the folder
        return
    record = read_record(folder).to_json()
    if shown := record["showcase"]:
        show("", examples_shown(shown, titles(record["settings"]["pattern"])), "", side_table(record))
    print(f"\nwritten to {folder} (report.html, permprune.json). Next:\n")
    print(next_steps(record, folder))


def write_figures(target: Path | IO[str] | None, figures: object) -> None:
    """Write results as JSON to a file or a stream, if one is given."""
    from permprune.system.files import json_text, write_json

    if isinstance(target, Path):
        write_json(target, figures)
    elif target is not None:
        target.write(json_text(figures))
