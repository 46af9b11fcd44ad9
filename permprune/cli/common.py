"""The application, the options that several commands share, and the reporting of errors.

The modules of this package import at the top only what their options need. A command is a generator: up to its `yield`
it makes its settings, by modules that do not import torch or transformers, which takes seconds; after it, it runs.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

import permprune
from permprune.cli.checks import STDOUT, require_files, require_text
from permprune.cli.program import Program
from permprune.config import UNSET, PruneConfig
from permprune.errors import PermpruneError
from permprune.system.interrupts import interruptible
from permprune.system.progress import console, log

if TYPE_CHECKING:
    from permprune.evaluation.lm_tasks import TaskList


app = typer.Typer(
    cls=Program,
    help="Learns channel permutations so that N:M pruning of a Transformer loses less.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Model = Annotated[str, typer.Argument(help="a zoo name such as smollm2-135m, a folder, or a hub id")]
Folder = Annotated[Path, typer.Argument(help="a folder that permprune wrote")]
Data = Annotated[
    str | None,
    typer.Option(
        help="data to evaluate on: text, sentences, images or speech in a file or folder, or a data set id",
        show_default="the default data",
    ),
]
Windows = Annotated[int, typer.Option(help="windows of text to evaluate on; 32 sentences or images count as one")]
Length = Annotated[int, typer.Option(help="tokens per window of text")]
Metric = Annotated[
    str | None,
    typer.Option(
        help="metric for labels: accuracy, matthews, f1, pearson or spearman",
        show_default="accuracy for classes, pearson for scores",
    ),
]
Tasks = Annotated[
    str, typer.Option(help="tasks of lm-eval, or wikitext2, separated by commas (docs/tasks.md)", show_default="none")
]
TaskFile = Annotated[
    list[str] | None,
    typer.Option(help="YAML file of an lm-eval task or group; runs the code that it names; may be repeated"),
]
TaskData = Annotated[
    str | None, typer.Option(help="folder with local files of the tasks (docs/tasks.md)", show_default="the hub")
]
Limit = Annotated[int | None, typer.Option(help="examples per task", show_default="all")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run the Python code that comes with the model, if it needs any")
]
Resume = Annotated[bool, typer.Option("--resume", help="continue an interrupted run")]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="write the results to this JSON file; - is stdout, and tables then go to stderr"),
]
Picture = Annotated[Path | None, typer.Option(help="draw the results in this PNG file")]

METHODS = (
    "none, random, ria, cp, permllm, reconstruction, learned-paper, learned or newton, with options after the name, "
    "such as newton:rounds=6"
)

Permute = Annotated[
    str | None,
    typer.Option(help=f"search for the channel order: {METHODS}", show_default="newton, or that of --effort"),
]
UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


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


def prune_config(
    effort: Annotated[
        str | None,
        typer.Option(
            help="how much work: seconds (ria), minutes (about ten: newton, then training of the weights that stay) or "
            "hour (the same for an hour); sets --permute, --samples and --minutes unless they are given",
            show_default="newton with its 16 rounds",
        ),
    ] = None,
    permute: Permute = None,
    pattern: Annotated[
        str,
        typer.Option(help="N:M keeps N of every M consecutive weights; mixed: a pattern for each layer", metavar="N:M"),
    ] = PruneConfig.pattern,
    saliency: Annotated[str, typer.Option(help="score of the weights: magnitude, wanda, ria or obs")] = "wanda",
    mode: Annotated[
        str,
        typer.Option(
            help="fold: orders are written into the weights, at no cost at run time; "
            "gather: one index_select at each norm, loses less quality"
        ),
    ] = PruneConfig.mode,
    update: Annotated[
        str,
        typer.Option(
            help="update of the weights that are kept, which compensates for the others: none, sparsegpt or admm"
        ),
    ] = "none",
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="data to calibrate on: text, sentences, images or speech in a file or folder, or a data set id; "
            "may be repeated to mix sources",
            show_default="the default data",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="windows of text to calibrate on; 32 sentences or 8 images count as one",
            show_default="192, or those of --effort",
        ),
    ] = None,
    length: Length = PruneConfig.length,
    seed: Annotated[int, typer.Option(help="random seed: the same one gives the same permutations")] = PruneConfig.seed,
    precision: Annotated[
        str, typer.Option(help="data type of activations in the search: auto, fp32 or bf16")
    ] = PruneConfig.precision,
    memory: Annotated[
        str | None,
        typer.Option(
            help="memory limit for tensors, such as 8GiB: prune chooses leaner settings, or runs layer by layer",
            show_default="no limit",
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(help="calibration windows in a batch; fewer need less memory")
    ] = PruneConfig.batch,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="recompute activations in the backward pass: slower, but less memory")
    ] = PruneConfig.recompute,
    shard: Annotated[
        bool | None,
        typer.Option(
            help="under torchrun, divide the weights among the processes, or let each hold the whole model",
            show_default="divide them if the model does not fit",
        ),
    ] = None,
    minutes: Annotated[
        str | None,
        typer.Option(
            help="time limit of the search in minutes (the result then depends on the machine), or none",
            show_default="none, or that of --effort",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="glob of names of layers that stay dense; may be repeated")
    ] = None,
    trust_remote_code: TrustRemoteCode = PruneConfig.trust_remote_code,
) -> PruneConfig:
    """The options of every command that prunes."""
    return PruneConfig(
        effort=effort,
        permute=UNSET if permute is None else permute,
        pattern=pattern,
        saliency=saliency,
        mode=mode,
        update=update,
        calibration=calibration or None,
        samples=UNSET if samples is None else samples,
        length=length,
        seed=seed,
        precision=precision,
        memory=parse_bytes(memory),
        batch=batch,
        recompute=recompute,
        shard=shard,
        minutes=UNSET if minutes is None else parse_minutes(minutes),
        exclude=tuple(exclude or ()),
        trust_remote_code=trust_remote_code,
    )


def command(function: Callable[..., Iterator[None]], without: Iterable[str] = ()) -> Callable[..., Any]:
    """Register a command; `PermpruneError` becomes one line on stderr and exit status 2, Ctrl-C exit status 130.

    A parameter annotated `PruneConfig` stands for the options of `prune_config`, except for those in `without`. Before
    anything slow is imported, the function runs up to its `yield`, and its inputs and outputs are looked for.
    """
    own = inspect.signature(function, eval_str=True).parameters
    every = inspect.signature(prune_config, eval_str=True).parameters
    shared = {name: parameter for name, parameter in every.items() if name not in without}
    place = next((name for name, parameter in own.items() if parameter.annotation is PruneConfig), "")
    parameters = own.keys() | shared.keys() if place else own.keys()

    @wraps(function)
    def run(**options: Any) -> None:
        given, first = dict(options), "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"
        streamed = given.get("json") in STDOUT
        if streamed:
            options["json"] = sys.stdout if first else None
        with redirect_stdout(sys.stderr if streamed else sys.stdout):
            with _speaking(first), _reported(parameters):
                require_text(given)
                if streamed and first and options["json"] is None:
                    raise PermpruneError("stdout is closed: give --json a file")
                if place:
                    options[place] = prune_config(**{name: options.pop(name) for name in shared})
                work = function(**options)
                next(work, None)
                require_files(given)

            from permprune.engine import held  # noqa: F401 - with it nearly all that a command imports
            from permprune.system import distributed
            from permprune.system.memory import keep_freed_memory

            _quiet_libraries()
            keep_freed_memory()
            with interruptible(), distributed.processes(), _speaking(distributed.rank() == 0), _reported(parameters):
                try:
                    next(work, None)
                except KeyboardInterrupt:
                    from permprune.system.files import WorkFolder

                    kept = "resume" in options and WorkFolder(options["out"]).holds_state()
                    hint = "; repeat the command with --resume to continue" if kept else ""
                    print(f"permprune: interrupted{hint}", file=sys.stderr)
                    raise typer.Exit(130) from None

    offered = [p for name, parameter in own.items() for p in (shared.values() if name == place else [parameter])]
    run.__signature__ = inspect.Signature(offered)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in offered}
    app.command()(run)
    return run


@contextmanager
def _reported(parameters: Collection[str]) -> Iterator[None]:
    """A context that prints a `PermpruneError` in one line and exits with status 2."""
    try:
        yield
    except PermpruneError as error:
        from permprune.system.out_of_memory import OutOfMemory

        said = OutOfMemory(error.peak, parameters) if isinstance(error, OutOfMemory) else error
        print(f"permprune: {said}", file=sys.stderr)
        raise typer.Exit(2) from None


def _quiet_libraries() -> None:
    """Turn off the logs and progress bars of other libraries."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


@contextmanager
def _speaking(speaks: bool) -> Iterator[None]:
    """Suppress all output unless `speaks`: of several processes only one writes to the terminal."""
    if speaks:
        yield
        return
    console.quiet = True
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


def parse_bytes(text: str | None) -> int | None:
    """Parse an amount of memory such as "8GiB"; returns bytes. Raises `PermpruneError` unless it is positive."""
    if text is None:
        return None
    number = text.rstrip("BGIKMbgikm")
    try:
        size = int(float(number) * UNITS[text[len(number) :].strip().upper()])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise PermpruneError(f'"{text}" is not an amount of memory: give one above 0, such as 8GiB or 500MB')
    return size


def parse_minutes(text: str) -> float | None:
    """Parse a time limit in minutes; "none" is None. Raises `PermpruneError` for a text that is neither."""
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise PermpruneError(f"minutes is {text!r}: give a number above 0, or none for no limit") from None


def parts(text: str) -> list[str]:
    """Split a list such as "a, b" at its commas; empty parts are left out."""
    return [part.strip() for part in text.split(",") if part.strip()]


def task_list(
    names: str, files: list[str] | None, data: str | None, limit: int | None, few_shot: int | None = None
) -> TaskList | None:
    """Return the tasks that the options name; None if they name none."""
    from permprune.evaluation.lm_tasks import TaskList

    if not names and not files:
        return None
    return TaskList(tuple(parts(names)), data=data, limit=limit, few_shot=few_shot, files=tuple(files or ()))


def show(table: Table) -> None:
    """Print a table, as wide as it needs if the output is not a terminal."""
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def write_figures(target: Path | IO[str] | None, figures: object) -> None:
    """Write results as JSON to a file or a stream, if one is given."""
    from permprune.system.files import json_text, write_json

    if isinstance(target, Path):
        write_json(target, figures)
    elif target is not None:
        target.write(json_text(figures))
