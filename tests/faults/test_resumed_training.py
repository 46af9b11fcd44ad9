"""Training that is killed between and within its steps continues to the same weights, bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from permprune.training.loop import Trainer

from ..cli.running import run
from ..forked import calls, run_until
from .test_resuming import write_text

pytestmark = pytest.mark.slow


def written(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


ADAM = "permprune.training.kept_weights.adam_step"
ADMM = "permprune.updates.methods.cholesky"
LAYERS = 14
"""Of the tiny LLaMA; each step of a training calls `adam_step` once for each."""


@pytest.mark.parametrize(
    ("dtype", "update", "train", "place", "call"),
    [
        ("fp32", "none", "steps=8", ADAM, 6 * LAYERS + 5),  # in the seventh step
        ("bf16", "admm", "steps=6", ADAM, 4 * LAYERS + 5),
        ("bf16", "admm", "steps=2", ADMM, 10),  # in the second block
        ("fp32", "none", "steps=2:blocks=true", ADAM, 4 * LAYERS // 2 + 5),  # in the second block
        ("fp32", "none", "steps=14:rate=0.05", ADAM, 12 * LAYERS + 5),  # after it went back
    ],
)
def test_a_killed_recipe_continues(
    tiny_checkpoint: Path,
    tmp_path: Path,
    dtype: str,
    update: str,
    train: str,
    place: str,
    call: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if dtype == "bf16":
        LlamaForCausalLM.from_pretrained(tiny_checkpoint).bfloat16().save_pretrained(tiny_checkpoint)
    text = write_text(tmp_path / "text.txt", "calibration")
    command = ["prune", tiny_checkpoint, "--calibration", text, "--data", text, "--length", "16", "--samples", "24"]
    command += ["--windows", "4", "--order", "ria", "--update", update, "--train", train]
    patches = {"permprune.training.kept_weights.RISEN": 0.9}
    for name, value in patches.items():
        monkeypatch.setattr(name, value)
    every, whole, out = calls(place, monkeypatch), tmp_path / "whole", tmp_path / "out"
    code, _, stderr = run(*command, "--out", whole)
    assert code == 0, stderr
    made = len(every)
    every.clear()
    run_until(place, call, *command, "--out", out, patches=patches)
    code, _, stderr = run(*command, "--out", out, "--resume")
    assert code == 0, stderr
    steps = LAYERS if place == ADAM else 1  # the step, or block, in which it was killed is made again, and no other one
    steps = 4 * LAYERS // 2 if "blocks" in train else LAYERS // 2 if place == ADMM else steps
    assert len(every) == made - (call - 1) // steps * steps
    records = [json.loads((folder / "permprune.json").read_text()) for folder in (whole, out)]
    assert records[0]["permutations"] == records[1]["permutations"]
    one, other = written(whole), written(out)
    assert one.keys() == other.keys() and all(torch.equal(other[name], weight) for name, weight in one.items())


@pytest.mark.parametrize("options", [[], ["--adapters", "2"], ["--teacher"]], ids=["dropout", "adapters", "teacher"])
def test_a_killed_fine_tuning_continues_within_the_epoch(
    tiny_bert: Path, tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, place = tmp_path / "data.tsv", "torch.nn.utils.clip_grad_norm_"
    rows = [f"{'the order of channels ' * (1 + i % 3)}{i}\t{['no', 'Maybe', 'yes'][i % 3]}" for i in range(40)]
    data.write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    command = ["finetune", tiny_bert, "--data", data, "--dev", data, "--batch", "8", "--epochs", "3", *options]
    command += [shutil.copytree(tiny_bert, tmp_path / "teacher")] if options == ["--teacher"] else []
    curves, add = list[tuple[float | None, ...]](), Trainer._add

    def keep(self: Trainer, *arguments: Any) -> None:
        add(self, *arguments)
        curves.append((self.curve[-1].loss, self.curve[-1].value, self.curve[-1].held_out))

    monkeypatch.setattr(Trainer, "_add", keep)
    every, whole, out = calls(place, monkeypatch), tmp_path / "whole", tmp_path / "out"
    code, _, stderr = run(*command, "--out", whole)
    assert code == 0, stderr
    assert len(every) == 3 * 5
    every.clear()
    run_until(place, 8, *command, "--out", out)  # in the third step of the second epoch
    code, _, stderr = run(*command, "--out", out, "--resume")
    assert code == 0, stderr
    assert len(every) == 15 - 7 and curves[2:4] == curves[4:]
    one, other = written(whole), written(out)
    assert one.keys() == other.keys() and all(torch.equal(other[name], weight) for name, weight in one.items())
