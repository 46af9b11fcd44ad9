"""Damage folders at random, and see what the commands make of them: python -m tests.faults.fuzz --count 500

A case copies one of the `SUBJECTS` (a checkpoint, what prune, pack and finetune make of it, or a pruned cache), damages
a file (`mutations`), and has verify, evaluate and one more command read it, in a process that may die or hang. Right
are a status of 2 with one line on stderr, and a status of 0 with a right result (`Fuzz.judge`), which the `oracle`
computes from the files by itself. Anything else, or a file changed outside of --out, is a failure, printed with the
number that repeats it (--only).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .mutations import mutate
from .oracle import Llama, Unjudged, channels_fit, read_tensors, same_tensors, settings_of_cache

GOOD = ("right", "refused")
PRUNED = [f"{kind}-{mode}" for kind in ("pruned", "trained") for mode in ("fold", "gather")]
PACKED = [f"{dtype}-{mode}" for dtype in ("bf16", "int8") for mode in ("fold", "gather")]
SUBJECTS = ["checkpoint", *PRUNED, *PACKED, "cache"]
COMMANDS = ("verify", "evaluate", "prune", "pack", "unpack", "kv", "finetune")
WARNING = ("[", " ")
"""What the lines of warnings begin with, which may stand before that of an error: a time, or the room for one."""

LIMIT, GRACE = 120, 30
"""Seconds that a command may take, and those that its process gets to say so."""

MEMORY = 12 * 2**30
"""Bytes of address space that a process may take."""

RECYCLED = 40
"""Cases after which a process is replaced."""

TOKENIZER = ("tokenizer", "special_tokens", "added_tokens")
"""Beginnings of the names of files on which the tokens depend, which the oracle does not make."""

CLOSE, ROUNDED = 1e-4, 3e-2
"""Relative errors of what is computed in fp32, and in bf16 or with rounded weights."""


class Case(NamedTuple):
    number: int
    subject: str
    file: str
    kind: str
    folder: Path


class Outcome(NamedTuple):
    case: Case
    command: str
    verdict: str
    detail: str = ""


# What runs in a process of its own.


class Hang(BaseException):
    """Ends a command that takes too long."""


def serve(pipe: Connection, root: Path) -> None:
    """Run the commands that come through a pipe; each is answered with what it did."""
    import resource
    import signal
    import socket

    noise = os.open(root / f"noise-{os.getpid()}", os.O_RDWR | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(noise, stream)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ |= {"PERMPRUNE_CACHE": str(root / "cache"), "HF_HOME": str(root / "hub")}
    asked: list[str] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        asked.append(str(arguments[:2]))
        raise OSError("no network")

    socket.getaddrinfo = refuse  # type: ignore[assignment]
    socket.socket.connect = refuse  # type: ignore[method-assign]

    def hang(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    import permprune.jobs.prune
    import permprune.jobs.verify  # noqa: F401 - that the commands import all this takes longer than they may
    from permprune.system.progress import console

    console.width = 200
    while (request := pipe.recv()) is not None:
        asked.clear()
        os.ftruncate(noise, 0)
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        try:
            answer = _answer(*request)
        except Hang:
            answer = {"hang": True}
        signal.setitimer(signal.ITIMER_REAL, 0)
        answer["network"] = list(asked)
        answer["noise"] = os.pread(noise, 5000, 0).decode(errors="replace")
        pipe.send(answer)


def _answer(kind: str, *arguments: Any) -> dict[str, Any]:
    return {"run": _run}[kind](*arguments)


def _run(arguments: list[str], folder: str) -> dict[str, Any]:
    import traceback

    from typer.testing import CliRunner

    from permprune.cli import app

    os.chdir(folder)
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, Hang):
        raise result.exception
    trace = ""
    if result.exc_info and not isinstance(result.exception, (SystemExit, type(None))):
        trace = "".join(traceback.format_exception(*result.exc_info))
    return {"status": result.exit_code, "stdout": result.stdout, "stderr": result.stderr, "trace": trace}


# What runs in this one.


class Worker:
    """A process that serves, and is replaced when it dies or hangs."""

    def __init__(self, root: Path) -> None:
        self.root, self.process, self.served = root, None, 0

    def ask(self, *request: Any) -> dict[str, Any]:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process: Any = context.Process(target=serve, args=(theirs, self.root), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send(request)
            if not self.pipe.poll(LIMIT + GRACE):
                self.stop()
                return {"hang": True}
            return self.pipe.recv()  # type: ignore[no-any-return]
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            self.stop()
            return {"crash": code}

    def rest(self) -> None:
        """After a case."""
        self.served += 1
        if self.served % RECYCLED == 0:
            self.stop()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None


class Fuzz:
    """The folders to damage and what the commands say of them as they are, in a folder for everything."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed = root, seed
        self.texts = root / "subjects"
        self.subjects, self.ids = make_subjects(self.texts)
        self.models = {name: Llama(folder) for name, folder in self.subjects.items() if name != "cache"}
        self.expected: dict[tuple[str, str], float] = {}
        worker = Worker(root)
        for subject in self.subjects:
            case = Case(-1, subject, "", "", self._copied(-1, subject))
            for command in COMMANDS if subject != "cache" else ["evaluate"]:
                outcome = self.run(case, command, worker)
                if outcome.verdict not in GOOD:
                    raise SystemExit(f"{subject} as it is: {command}: {outcome.verdict}\n{outcome.detail}")
            shutil.rmtree(case.folder)
        worker.stop()

    def cases(self, numbers: list[int]) -> Iterator[Case]:
        for number in numbers:
            generator = random.Random(f"{self.seed} {number}")
            subject = generator.choice(SUBJECTS)
            folder = self._copied(number, subject)
            file, kind = mutate(generator, folder / "model")
            yield Case(number, subject, file, kind, folder)

    def commands(self, case: Case) -> list[str]:
        """The commands that read a case: two that are quick, and one of the others."""
        if case.subject == "cache":
            return ["evaluate"]
        return ["verify", "evaluate", random.Random(f"{self.seed} {case.number} command").choice(COMMANDS[2:])]

    def _copied(self, number: int, subject: str) -> Path:
        folder = self.root / f"case-{number}"
        (folder / "work").mkdir(parents=True)
        shutil.copytree(self.subjects[subject], folder / "model")
        return folder

    def run(self, case: Case, command: str, worker: Worker) -> Outcome:
        """Run a command on a case and judge it."""
        before = snapshot(case.folder)
        answer = worker.ask("run", self._arguments(case, command), str(case.folder / "work"))
        after = snapshot(case.folder)
        changed = sorted(
            name
            for name in before.keys() | after.keys()
            if before.get(name) != after.get(name) and not name.startswith((f"{command}/", f"{command}.json"))
        )
        if changed:
            return Outcome(case, command, "wrote", ", ".join(changed))
        verdict, detail = self.judge(case, command, answer, worker)
        return Outcome(case, command, verdict, detail)

    def _arguments(self, case: Case, command: str) -> list[str]:
        model, figures = str(case.folder / "model"), ["--json", str(case.folder / f"{command}.json")]
        one, data = str(self.texts / "one.txt"), ["--data", str(self.texts / "two.txt"), "--windows", "4"]
        data += ["--length", "16"]
        if case.subject == "cache":
            return ["evaluate", str(self.subjects["checkpoint"]), "--kv", model, *data, *figures]
        if command in ("verify", "evaluate"):
            return [command, model, *([*data, *figures] if command == "evaluate" else [])]
        options = {
            "prune": [*data, "--calibration", one, "--samples", "24", "--permute", "ria"],
            "pack": [],
            "unpack": [],
            "kv": [*data, "--calibration", one, "--samples", "4", *CACHE],
            "finetune": ["--data", one, "--epochs", "1", "--rows", "8", "--length", "16", "--lr", "1e-3"],
        }
        return [command, model, *options[command], "--out", str(case.folder / command)]

    def judge(self, case: Case, command: str, answer: dict[str, Any], worker: Worker) -> tuple[str, str]:
        """What to call an answer: one of `GOOD`, or a failure; and what it said, or what is wrong with it."""
        for failure in ("crash", "hang", "network"):
            if answer.get(failure):
                return failure, str(answer[failure])
        if answer["trace"]:
            return "traceback", answer["trace"]
        if answer["noise"]:
            return "noise", answer["noise"]
        if answer["status"] == 2:
            lines = [line for line in answer["stderr"].splitlines() if line and not line.startswith(WARNING)]
            one = len(lines) == 1 and lines[0].startswith("permprune: ")
            if not one:
                return "lines", answer["stderr"]
            return ("refused", lines[0]) if case.number >= 0 or self._unfit(case, command) else ("wrong", lines[0])
        if answer["status"] != 0:
            return "status", f"{answer['status']}: {answer['stderr']}"
        try:
            wrong = self._wrong(case, command, worker)
        except Unjudged:
            wrong = ""
        except (ArithmeticError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            wrong = f"accepted, though it cannot be read: {error!r}"
        return ("wrong", wrong) if wrong else ("right", answer["stdout"])

    @staticmethod
    def _unfit(case: Case, command: str) -> bool:
        """Whether a subject is none that a command takes: it is not pruned, or packed, or not packed."""
        if case.subject in PACKED:
            return command in ("prune", "pack", "finetune")
        return command in (("verify", "pack", "unpack") if case.subject == "checkpoint" else ("unpack",))

    def _wrong(self, case: Case, command: str, worker: Worker) -> str:
        """What is wrong with a command that succeeded."""
        if self._unfit(case, command):
            return "this is not for such a model"
        if case.subject == "cache":
            return self._wrong_cache(case)
        now, before = Llama(case.folder / "model"), self.models[case.subject]
        logits = now.logits(self.ids)
        if case.subject != "checkpoint":
            if not same_tensors(now.tensors, before.tensors):
                return "takes weights that were changed"
            if case.file != "config.json" and not self._close(logits, before.logits(self.ids), 1e-9):
                return "takes orders that were changed"
        match command:
            case "verify":
                return self._differs(case.folder / "model", before.logits(self.ids), before, 1e-3)
            case "evaluate":
                value = json.loads((case.folder / "evaluate.json").read_text())["value"]
                return self._wrong_value(case, command, value, now.perplexity(self.ids))
            case "prune":
                measured = json.loads((case.folder / command / "permprune.json").read_text())["measured"]
                made = Llama(case.folder / command)
                if off := made.off_pattern(dict.fromkeys(made.layers, "2:4")):
                    return f"layers are not 2:4: {off}"
                return self._wrong_value(
                    case, "dense", measured["dense"], now.perplexity(self.ids)
                ) or self._wrong_value(case, command, measured["pruned"], made.perplexity(self.ids))
            case "kv":
                measured = json.loads((case.folder / command / "kv.json").read_text())["measured"]
                if not channels_fit(case.folder / command):
                    return "channels that are none"
                self._wrong_value(case, "cached", measured["pruned"], None)
                return self._wrong_value(case, "dense", measured["dense"], now.perplexity(self.ids))
            case "finetune":
                return self._wrong_training(case, worker)
        return self._differs(case.folder / command, logits, before, ROUNDED if command == "pack" else CLOSE)

    def _differs(self, folder: Path, logits: Tensor, before: Llama, error: float) -> str:
        """What is wrong with a folder that should give these logits and hold the patterns of a pruned model."""
        made = Llama(folder)
        if not self._close(made.logits(self.ids), logits, error):
            return f"logits differ by {float((made.logits(self.ids) - logits).abs().max())}"
        return f"layers do not hold their patterns: {off}" if (off := made.off_pattern(patterns(before))) else ""

    @staticmethod
    def _close(one: Tensor, other: Tensor, error: float) -> bool:
        return one.shape == other.shape and bool((one - other).abs().max() <= error * other.abs().max())

    def _wrong_training(self, case: Case, worker: Worker) -> str:
        """What is wrong with a trained folder: pruned weights that are not zero, or a perplexity of other weights."""
        before, made = self.models[case.subject], Llama(case.folder / "finetune")
        for name in patterns(before):
            if made.weight(name)[before.weight(name) == 0].any():
                return f"pruned weights of {name} are not zero"
        figures = case.folder / "finetune.json"
        arguments = self._arguments(Case(*case[:4], case.folder), "evaluate")
        arguments[1], arguments[-1] = str(case.folder / "finetune"), str(figures)
        answer = worker.ask("run", arguments, str(case.folder / "work"))
        if answer.get("status") != 0:
            return f"what was trained cannot be evaluated: {answer}"
        value = json.loads(figures.read_text())["value"]
        return self._wrong_value(case, "finetune", value, made.perplexity(self.ids))

    def _wrong_cache(self, case: Case) -> str:
        """What is wrong with a cache that was used: its settings, its channels and the perplexity are those it had."""
        folder, before = case.folder / "model", self.subjects["cache"]
        if settings_of_cache(folder) != settings_of_cache(before):
            return "takes settings that were changed"
        if not same_tensors(*(read_tensors(own / "kv.safetensors") for own in (folder, before))):
            return "takes channels that were changed"
        return self._wrong_value(
            case, "evaluate", json.loads((case.folder / "evaluate.json").read_text())["value"], None
        )

    def _wrong_value(self, case: Case, what: str, value: float | None, expected: float | None) -> str:
        """A perplexity has to be that of the files, and that of the folder as it was if the file does not matter."""
        value = float(value or math.nan)
        if case.number < 0:
            self.expected[case.subject, what] = value
        if case.file.startswith(TOKENIZER):
            return ""
        error = ROUNDED if case.subject in PACKED else CLOSE
        if expected is not None and not math.isclose(value, expected, rel_tol=error):
            return f"{what}: {value} in place of {expected}"
        before = self.expected[case.subject, what]
        same = case.subject != "checkpoint" and case.file != "config.json"
        if same and not math.isclose(value, before, rel_tol=1e-6):
            return f"{what}: {value} in place of {before}, though {case.file} does not matter"
        return ""


CACHE = ["--window", "0", "--sinks", "2"]
"""Options with which a cache prunes windows of sixteen tokens."""


def patterns(model: Llama) -> dict[str, str]:
    """The patterns of a model's layers as its record has them."""
    return {layer["name"]: layer["pattern"] for layer in model.record.get("layers", [])}


def make_subjects(folder: Path) -> tuple[dict[str, Path], Tensor]:
    """Make the `SUBJECTS`, and two texts beside them; also returns the tokens on which they are evaluated."""
    from transformers.utils.logging import disable_progress_bar

    import permprune
    from permprune.jobs.finetune import FineTuning
    from permprune.kv.config import KVConfig

    from ..fixtures import SENTENCES, make_tiny_llama, make_tiny_tokenizer

    folder.mkdir(parents=True)
    for name in ("one", "two"):
        words = [word for sentence in SENTENCES for word in sentence.split()]
        generator = random.Random(name)
        (folder / f"{name}.txt").write_text(" ".join(generator.choice(words) for _ in range(1500)))
    disable_progress_bar()
    one, subjects = str(folder / "one.txt"), {name: folder / name for name in SUBJECTS}
    checkpoint, evaluation = str(subjects["checkpoint"]), permprune.Evaluation(str(folder / "two.txt"), 4, 16)
    make_tiny_llama().save_pretrained(checkpoint)
    make_tiny_tokenizer().save_pretrained(checkpoint)
    for mode in ("fold", "gather"):
        config = permprune.PruneConfig(permute="random", mode=mode, calibration=one, samples=24, length=16)
        pruned = subjects[f"pruned-{mode}"]
        permprune.prune_to_folder(checkpoint, pruned, config, evaluation=evaluation)
        options = FineTuning(one, epochs=1, rows=16, length=16, lr=1e-3)
        permprune.finetune(str(pruned), subjects[f"trained-{mode}"], options)
        for dtype in ("bf16", "int8"):
            permprune.pack_folder(pruned, subjects[f"{dtype}-{mode}"], dtype=dtype)
    options = {"calibration": one, "samples": 4, "length": 16, "evaluation": evaluation}
    permprune.calibrate_kv(checkpoint, subjects["cache"], KVConfig(window=0, sinks=2), **options)
    model, processor, _ = permprune.read_model(checkpoint)
    return subjects, evaluation.examples(model, processor)["input_ids"]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file, by its path within the folder."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[path.relative_to(folder).as_posix() + "/" * path.is_dir()] = (
            (0, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns)
        )
    return found


def fuzz(root: Path, seed: int, numbers: list[int], workers: int) -> list[Outcome]:
    """Run the cases of these numbers in so many processes."""
    state = Fuzz(root, seed)
    outcomes: list[Outcome] = []
    cases, lock, began = state.cases(numbers), threading.Lock(), time.monotonic()

    def work() -> None:
        worker = Worker(root)
        while True:
            with lock:
                case = next(cases, None)
            if case is None:
                return worker.stop()
            for command in state.commands(case):
                outcome = state.run(case, command, worker)
                with lock:
                    outcomes.append(outcome)
                    if outcome.verdict not in GOOD:
                        print(f"\n{describe(outcome)}", flush=True)
            shutil.rmtree(case.folder)
            worker.rest()
            done = len({outcome.case.number for outcome in outcomes})
            print(f"\r{done} of {len(numbers)} cases, {time.monotonic() - began:.0f} s ", end="", flush=True)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def describe(outcome: Outcome) -> str:
    case = outcome.case
    return (
        f"--only {case.number}: {outcome.command} of {case.subject}, {case.kind} in {case.file}: "
        f"{outcome.verdict}\n{outcome.detail[-3000:]}"
    )


def tally(outcomes: list[Outcome]) -> str:
    """A row for each command and kind of damage, a column for each verdict, as Markdown."""
    counts = Counter((o.command, o.case.kind, o.verdict) for o in outcomes)
    verdicts = [*GOOD, *sorted({o.verdict for o in outcomes} - set(GOOD))]
    lines = [f"| command | damage | {' | '.join(verdicts)} |", "|---|---|" + "---:|" * len(verdicts)]
    for command in COMMANDS:
        for kind in [*sorted({o.case.kind for o in outcomes}), "all"]:
            row = [
                sum(
                    n
                    for (own, damage, verdict), n in counts.items()
                    if own == command and kind in (damage, "all") and verdict == column
                )
                for column in verdicts
            ]
            if any(row):
                lines.append(f"| {command} | {kind} | {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases to run in place of all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        numbers = options.only or list(range(options.count))
        outcomes = fuzz(Path(root), options.seed, numbers, options.workers)
    failed = [outcome for outcome in outcomes if outcome.verdict not in GOOD]
    print(f"\n\n{tally(outcomes)}\n\n{len(numbers)} cases, {len(outcomes)} runs, {len(failed)} failures")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
