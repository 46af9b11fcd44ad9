"""Damage folders at random, and see what the commands make of them: python -m tests.faults.fuzz --count 500

A case copies one of the `SUBJECTS` (a checkpoint, what prune, pack and finetune make of it, or a pruned cache), damages
a file (`mutations`), and has verify, evaluate and one more command read it, in a process that may die or hang. Right
are a status of 2 with one line on stderr, and a status of 0 with a right result (`judge`), which the `oracle` computes
from the files by itself. Anything else, or a file changed outside of --out, is a failure, printed with the number that
repeats it (--only).
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .judge import GOOD, Case, Judge
from .mutations import mutate
from .process import Worker
from .subjects import SUBJECTS, TEXTS, make_subjects

COMMANDS = ("verify", "evaluate", "prune", "pack", "unpack", "kv", "finetune")
CACHE = ["--window", "0", "--sinks", "2"]
"""Options with which a cache prunes windows of sixteen tokens."""


class Outcome(NamedTuple):
    case: Case
    command: str
    verdict: str
    detail: str = ""


class Fuzz:
    """The folders to damage, and the judge, who has seen what the commands make of them without damage."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed = root, seed
        texts = root / "subjects"
        self.subjects, ids = make_subjects(texts)
        self.one, self.two = (str(texts / name) for name in TEXTS)
        self.judge = Judge(self.subjects, ids)
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
        """Return the commands that read a case: two that are quick, and one of the others."""
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
        reply = worker.run(self._arguments(case, command), case.folder / "work")
        after = snapshot(case.folder)
        changed = sorted(
            name
            for name in before.keys() | after.keys()
            if before.get(name) != after.get(name) and not name.startswith((f"{command}/", f"{command}.json"))
        )
        if changed:
            return Outcome(case, command, "wrote", ", ".join(changed))

        def evaluate(folder: Path) -> dict[str, Any]:
            return worker.run(self._evaluation(case, str(folder), "finetune"), case.folder / "work")

        return Outcome(case, command, *self.judge.verdict(case, command, reply, evaluate=evaluate))

    def _arguments(self, case: Case, command: str) -> list[str]:
        model = str(case.folder / "model")
        if command == "evaluate":
            return self._evaluation(case, model, "evaluate")
        if command == "verify":
            return [command, model]
        data = self._data()
        options = {
            "prune": [*data, "--calibration", self.one, "--samples", "24", "--order", "ria"],
            "pack": [],
            "unpack": [],
            "kv": [*data, "--calibration", self.one, "--samples", "4", *CACHE],
            "finetune": ["--data", self.one, "--epochs", "1", "--rows", "8", "--length", "16", "--lr", "1e-3"],
        }
        return [command, model, *options[command], "--out", str(case.folder / command)]

    def _data(self) -> list[str]:
        return ["--data", self.two, "--windows", "4", "--length", "16"]

    def _evaluation(self, case: Case, model: str, figures: str) -> list[str]:
        cached = ["--kv", model] if case.subject == "cache" else []
        evaluated = str(self.subjects["checkpoint"]) if cached else model
        return ["evaluate", evaluated, *cached, *self._data(), "--json", str(case.folder / f"{figures}.json")]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the size and time of every file, by its path within the folder."""
    files = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            files[name + "/"] = (0, 0)
        else:
            files[name] = (status.st_size, status.st_mtime_ns)
    return files


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
    """Return a row for each command and kind of damage, a column for each verdict, as Markdown."""
    verdicts = [*GOOD, *sorted({outcome.verdict for outcome in outcomes} - set(GOOD))]
    lines = [f"| command | damage | {' | '.join(verdicts)} |", "|---|---|" + "---:|" * len(verdicts)]
    counts = Counter((o.command, kind, o.verdict) for o in outcomes for kind in (o.case.kind, "all"))
    for command in COMMANDS:
        for kind in [*sorted({outcome.case.kind for outcome in outcomes}), "all"]:
            row = [counts[command, kind, verdict] for verdict in verdicts]
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
