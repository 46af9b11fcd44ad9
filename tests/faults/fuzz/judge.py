"""What commands may do with a damaged folder: refuse it in one line, or give what the oracle computes from it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .oracle import Llama, Unjudged, channels_fit, read_tensors, same_tensors, settings_of_cache
from .subjects import PACKED

GOOD = ("right", "refused")
WARNING = ("[", " ")
"""What the lines of warnings begin with, which may stand before that of an error: a time, or the room for one."""

TOKENIZER = ("tokenizer", "special_tokens", "added_tokens")
"""Beginnings of the names of files on which the tokens depend, which the oracle does not make."""

CLOSE, ROUNDED = 1e-4, 3e-2
"""Relative errors of what is computed in fp32, and in bf16 or with rounded weights."""

UNREADABLE = (ArithmeticError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError)


class Case(NamedTuple):
    """A damaged copy of a subject in `folder`/model; `number` is -1, and `file` and `kind` are empty, before damage."""

    number: int
    subject: str
    file: str
    kind: str
    folder: Path


Evaluate = Callable[[Path], dict[str, Any]]
"""Evaluates what a case trained with the command; returns the reply, whose figures are in the case's finetune.json."""


class Judge:
    """Judges replies; it first has to see those for all subjects without damage, whose perplexities it notes."""

    def __init__(self, subjects: Mapping[str, Path], ids: Tensor) -> None:
        self.subjects, self.ids = subjects, ids
        self.models = {name: Llama(folder) for name, folder in subjects.items() if name != "cache"}
        self.expected: dict[tuple[str, str], float] = {}

    def verdict(self, case: Case, command: str, reply: Mapping[str, Any], *, evaluate: Evaluate) -> tuple[str, str]:
        """Return one of `GOOD`, or the kind of the failure; and what was printed, or what is wrong with it."""
        for failure in ("crash", "hang", "network"):
            if reply.get(failure):
                return failure, str(reply[failure])
        if reply["trace"]:
            return "traceback", reply["trace"]
        if reply["noise"]:
            return "noise", reply["noise"]
        if reply["status"] == 2:
            lines = [line for line in reply["stderr"].splitlines() if line and not line.startswith(WARNING)]
            if len(lines) != 1 or not lines[0].startswith("permprune: "):
                return "lines", reply["stderr"]
            return ("refused" if case.number >= 0 or unfit(case, command) else "wrong"), lines[0]
        if reply["status"] != 0:
            return "status", f"{reply['status']}: {reply['stderr']}"
        try:
            wrong = self._wrong(case, command, evaluate)
        except Unjudged:
            wrong = ""
        except UNREADABLE as error:
            wrong = f"accepted, though it cannot be read: {error!r}"
        return ("wrong", wrong) if wrong else ("right", reply["stdout"])

    def _wrong(self, case: Case, command: str, evaluate: Evaluate) -> str:
        """Return what is wrong with a command that succeeded."""
        if unfit(case, command):
            return "this is not for such a model"
        if case.subject == "cache":
            return self._wrong_cache(case)
        now, before = Llama(case.folder / "model"), self.models[case.subject]
        logits = now.logits(self.ids)
        if case.subject != "checkpoint":
            if not same_tensors(now.tensors, before.tensors):
                return "takes weights that were changed"
            if case.file != "config.json" and not close(logits, before.logits(self.ids), 1e-9):
                return "takes orders that were changed"
        match command:
            case "verify":
                return self._differs(case.folder / "model", before.logits(self.ids), before, 1e-3)
            case "evaluate":
                value = json.loads((case.folder / "evaluate.json").read_text())["value"]
                return self._wrong_value(case, command, value, now.perplexity(self.ids))
            case "prune":
                return self._wrong_pruning(case, now)
            case "kv":
                return self._wrong_calibration(case, now)
            case "finetune":
                return self._wrong_training(case, evaluate)
        return self._differs(case.folder / command, logits, before, ROUNDED if command == "pack" else CLOSE)

    def _differs(self, folder: Path, logits: Tensor, before: Llama, error: float) -> str:
        """Return what is wrong with a folder that should give these logits and hold the patterns of a pruned model."""
        made = Llama(folder)
        if not close(made.logits(self.ids), logits, error):
            return f"logits differ by {float((made.logits(self.ids) - logits).abs().max())}"
        return f"layers do not hold their patterns: {off}" if (off := made.off_pattern(patterns(before))) else ""

    def _wrong_pruning(self, case: Case, dense: Llama) -> str:
        measured = json.loads((case.folder / "prune" / "permprune.json").read_text())["measured"]
        made = Llama(case.folder / "prune")
        if off := made.off_pattern(dict.fromkeys(made.layers, "2:4")):
            return f"layers are not 2:4: {off}"
        wrong = self._wrong_value(case, "dense", measured["dense"], dense.perplexity(self.ids))
        return wrong or self._wrong_value(case, "prune", measured["pruned"], made.perplexity(self.ids))

    def _wrong_calibration(self, case: Case, dense: Llama) -> str:
        measured = json.loads((case.folder / "kv" / "kv.json").read_text())["measured"]
        if not channels_fit(case.folder / "kv"):
            return "channels that are none"
        wrong = self._wrong_value(case, "cached", measured["pruned"], None)
        return wrong or self._wrong_value(case, "dense", measured["dense"], dense.perplexity(self.ids))

    def _wrong_training(self, case: Case, evaluate: Evaluate) -> str:
        """Return what is wrong with a trained folder: pruned weights that are not zero, or another's perplexity."""
        folder = case.folder / "finetune"
        before, made = self.models[case.subject], Llama(folder)
        for name in patterns(before):
            if made.weight(name)[before.weight(name) == 0].any():
                return f"pruned weights of {name} are not zero"
        reply = evaluate(folder)
        if reply.get("status") != 0:
            return f"what was trained cannot be evaluated: {reply}"
        value = json.loads((case.folder / "finetune.json").read_text())["value"]
        return self._wrong_value(case, "finetune", value, made.perplexity(self.ids))

    def _wrong_cache(self, case: Case) -> str:
        """Return what is wrong with a cache that was used, whose settings, channels and perplexity must be the same."""
        folder, before = case.folder / "model", self.subjects["cache"]
        if settings_of_cache(folder) != settings_of_cache(before):
            return "takes settings that were changed"
        if not same_tensors(*(read_tensors(place / "kv.safetensors") for place in (folder, before))):
            return "takes channels that were changed"
        value = json.loads((case.folder / "evaluate.json").read_text())["value"]
        return self._wrong_value(case, "evaluate", value, None)

    def _wrong_value(self, case: Case, name: str, value: float | None, expected: float | None) -> str:
        """A perplexity has to be that of the files, and that of the folder as it was if the file does not matter."""
        value = float(value or math.nan)
        if case.number < 0:
            self.expected[case.subject, name] = value
        if case.file.startswith(TOKENIZER):
            return ""
        error = ROUNDED if case.subject in PACKED else CLOSE
        if expected is not None and not math.isclose(value, expected, rel_tol=error):
            return f"{name}: {value} in place of {expected}"
        before = self.expected[case.subject, name]
        same = case.subject != "checkpoint" and case.file != "config.json"
        if same and not math.isclose(value, before, rel_tol=1e-6):
            return f"{name}: {value} in place of {before}, though {case.file} does not matter"
        return ""


def unfit(case: Case, command: str) -> bool:
    """Whether the command does not take such a subject: it is not pruned, or packed, or not packed."""
    if case.subject in PACKED:
        return command in ("prune", "pack", "finetune")
    return command in (("verify", "pack", "unpack") if case.subject == "checkpoint" else ("unpack",))


def patterns(model: Llama) -> dict[str, str]:
    """Return the patterns of a model's layers as its record has them."""
    return {layer["name"]: layer["pattern"] for layer in model.record.get("layers", [])}


def close(one: Tensor, other: Tensor, error: float) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= error * other.abs().max())
