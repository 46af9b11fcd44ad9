"""Damage folders at random, and see what the commands make of them: python -m tests.faults.fuzz --count 500

A case copies a checkpoint, a folder pruned in fold mode or one in gather mode, damages a file (`mutations`), and has
verify, evaluate and prune read it, in a process that may die or hang. Right are a status of 2 with one line on stderr,
and a status of 0 with a right answer (`Fuzz.judge`); anything else, or a file changed outside of --out, is a failure,
printed with the number that repeats it (--only).
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

from .mutations import mutate

GOOD = ("right", "refused")
COMMANDS = ("verify", "evaluate", "prune")
WARNING = ("[", " ")
"""What the lines of warnings begin with, which may stand before that of an error: a time, or the room for one."""

LIMIT, GRACE = 120, 30
"""Seconds that a command may take, and those that its process gets to say so."""

MEMORY = 12 * 2**30
"""Bytes of address space that a process may take."""

RECYCLED = 40
"""Cases after which a process is replaced."""

IRRELEVANT = {"README.md", "generation_config.json", "probe.safetensors", "report.html"}
"""Files that the weights and what is measured of them do not depend on."""


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
    return {"run": _run, "difference": _difference}[kind](*arguments)


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


def _difference(folder: str, original: str) -> dict[str, Any]:
    """The largest difference of the outputs of the models in two folders, on the first one's probe and on noise."""
    import torch
    from safetensors.torch import load_file

    import permprune

    models = [permprune.load(path).float() for path in (folder, original)]
    ids = load_file(Path(original) / "probe.safetensors")["input_ids"]
    ids = torch.cat([ids, torch.randint(100, ids.shape, generator=torch.Generator().manual_seed(0))])
    with torch.inference_mode():
        first, second = (model(input_ids=ids).logits for model in models)
    return {"difference": float((first - second).abs().max())}


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
        self.subjects = make_subjects(root / "subjects")
        self.expected: dict[tuple[str, str], float] = {}
        worker = Worker(root)
        for subject in self.subjects:
            case = Case(-1, subject, "", "", self._copied(-1, subject))
            for command in COMMANDS:
                outcome = self.run(case, command, worker)
                if outcome.verdict not in GOOD:
                    raise SystemExit(f"{subject} as it is: {command}: {outcome.verdict}\n{outcome.detail}")
            shutil.rmtree(case.folder)
        worker.stop()

    def cases(self, numbers: list[int]) -> Iterator[Case]:
        for number in numbers:
            generator = random.Random(f"{self.seed} {number}")
            subject = generator.choice(sorted(self.subjects))
            folder = self._copied(number, subject)
            file, kind = mutate(generator, folder / "model")
            yield Case(number, subject, file, kind, folder)

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
            if before.get(name) != after.get(name) and not name.startswith(("out/", "figures.json"))
        )
        if changed:
            return Outcome(case, command, "wrote", ", ".join(changed))
        verdict, detail = self.judge(case, command, answer, worker)
        return Outcome(case, command, verdict, detail)

    def _arguments(self, case: Case, command: str) -> list[str]:
        texts, model = self.subjects["checkpoint"].parent, str(case.folder / "model")
        data = ["--data", str(texts / "two.txt"), "--windows", "4", "--length", "16"]
        if command == "verify":
            return ["verify", model]
        if command == "evaluate":
            return ["evaluate", model, *data, "--json", str(case.folder / "figures.json")]
        calibration = ["--calibration", str(texts / "one.txt"), "--samples", "24", "--permute", "ria"]
        return ["prune", model, *data, *calibration, "--out", str(case.folder / "out")]

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
            return ("refused", lines[0]) if case.number >= 0 else self._unexpected(case, command, lines[0])
        if answer["status"] != 0:
            return "status", f"{answer['status']}: {answer['stderr']}"
        wrong = getattr(self, f"_wrong_{command}")(case, worker)
        return ("wrong", wrong) if wrong else ("right", answer["stdout"])

    @staticmethod
    def _unexpected(case: Case, command: str, line: str) -> tuple[str, str]:
        """What was refused of a subject as it is: pruning a gathered model again may be."""
        fine = (case.subject, command) in (("checkpoint", "verify"), ("gather", "prune"))
        return ("refused" if fine else "wrong"), line

    def _wrong_verify(self, case: Case, worker: Worker) -> str:
        """What verify promised and does not hold: that the folder's outputs are those of the model that was pruned."""
        if case.subject == "checkpoint":
            return "nothing was pruned"
        answer = worker.ask("difference", str(case.folder / "model"), str(self.subjects[case.subject]))
        difference = answer.get("difference", math.nan)
        return "" if difference <= 1e-3 else f"outputs differ by {difference}: {answer}"

    def _wrong_evaluate(self, case: Case, worker: Worker) -> str:
        value = json.loads((case.folder / "figures.json").read_text())["value"]
        return self._wrong_value(case, "evaluate", value)

    def _wrong_prune(self, case: Case, worker: Worker) -> str:
        record = json.loads((case.folder / "out" / "permprune.json").read_text())
        if wrong := self._wrong_value(case, "prune", record["measured"]["pruned"]):
            return wrong
        answer = worker.ask("run", ["verify", str(case.folder / "out")], str(case.folder / "work"))
        return "" if answer.get("status") == 0 else f"what was pruned does not verify: {answer}"

    def _wrong_value(self, case: Case, command: str, value: float | None) -> str:
        """A value that has to be that of the folder as it was; of other weights or tokens it may be any."""
        if case.number < 0:
            self.expected[case.subject, command] = float(value or math.nan)
        expected = self.expected[case.subject, command]
        same = case.file in IRRELEVANT or (case.subject, case.file) == ("fold", "permprune.json")
        if same and not math.isclose(value or math.nan, expected, rel_tol=1e-6):
            return f"{value} in place of {expected}, though {case.file} does not matter"
        return ""


def make_subjects(folder: Path) -> dict[str, Path]:
    """A checkpoint, and what prune makes of it in fold mode and in gather mode; beside them two texts."""
    from transformers.utils.logging import disable_progress_bar

    import permprune

    from ..fixtures import SENTENCES, make_tiny_llama, make_tiny_tokenizer

    folder.mkdir(parents=True)
    for name in ("one", "two"):
        words = [word for sentence in SENTENCES for word in sentence.split()]
        generator = random.Random(name)
        (folder / f"{name}.txt").write_text(" ".join(generator.choice(words) for _ in range(1500)))
    disable_progress_bar()
    subjects = {name: folder / name for name in ("checkpoint", "fold", "gather")}
    make_tiny_llama().save_pretrained(subjects["checkpoint"])
    make_tiny_tokenizer().save_pretrained(subjects["checkpoint"])
    for mode in ("fold", "gather"):
        calibration = str(folder / "one.txt")
        config = permprune.PruneConfig(permute="random", mode=mode, calibration=calibration, samples=24, length=16)
        evaluation = permprune.Evaluation(str(folder / "two.txt"), 4, 16)
        permprune.prune_to_folder(str(subjects["checkpoint"]), subjects[mode], config, evaluation=evaluation)
    return subjects


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
            for command in COMMANDS:
                outcome = state.run(case, command, worker)
                with lock:
                    outcomes.append(outcome)
                    if outcome.verdict not in GOOD:
                        print(f"\n{describe(outcome)}", flush=True)
            shutil.rmtree(case.folder)
            worker.rest()
            done = len(outcomes) // len(COMMANDS)
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
