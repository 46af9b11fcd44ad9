"""`permprune pack` and `permprune unpack`."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import permprune
from permprune import PruneConfig, pack_folder
from permprune.checkpoints.record import read_record
from permprune.kernels.product.module import PackedLinear

from .running import fails, run

pytestmark = pytest.mark.slow

TOKENS = torch.arange(20).view(2, 10)


@pytest.fixture
def pruned(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder of the tiny LLaMA, pruned in the mode, and to the pattern, that the test asks for."""
    mode, pattern = request.param
    options = ["--calibration", tiny_text, "--data", tiny_text, "--length", "16", "--samples", "24", "--windows", "4"]
    out = tmp_path / "pruned"
    code, _, _ = run(
        "prune", tiny_checkpoint, *options, "--order", "ria", "--mode", mode, "--pattern", pattern, "--out", out
    )
    assert code == 0
    return out


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    found: torch.Tensor = permprune.read_model(str(folder))[0](TOKENS).logits
    return found


CASES = [
    (("fold", "2:4"), {"fp32": 1e-5, "int8": 0.05, "int4": 0.4}),
    (("gather", "2:4"), {"fp32": 1e-5, "bf16": 0.05}),
    (("gather", "mixed"), {"fp32": 1e-5}),
]
"""How it was pruned, and how far outputs may be from its own, beside the largest, for each type."""


@pytest.mark.parametrize(("pruned", "limits"), CASES, indirect=["pruned"])
def test_pack_verify_evaluate_unpack(pruned: Path, limits: dict[str, float], tiny_text: Path, tmp_path: Path) -> None:
    expected = logits(pruned)
    record = json.loads((pruned / "permprune.json").read_text())
    gathers, count = record["gathers"], len(record["layers"])
    for dtype, close in limits.items():
        packed, back = tmp_path / f"packed-{dtype}", tmp_path / f"back-{dtype}"
        calibration = ["--calibration", tiny_text] if dtype == "int4" else []
        code, stdout, _ = run("pack", pruned, "--dtype", dtype, *calibration, "--out", packed)
        assert code == 0 and re.search(r"pruned layers: 0.\d MB, dense 0.\d MB; all weights: 0.\d MB", stdout), stdout
        files = {path.name for path in packed.iterdir()}
        assert {"config.json", "packed.safetensors", "tokenizer.json", "permprune.json"} <= files
        assert not files & {"gathered.safetensors", "model.safetensors"}
        code, stdout, _ = run("verify", packed)
        assert code == 0 and f"{count} layers hold the pattern" in stdout and f"stored as {dtype}" in stdout
        options = ["--data", tiny_text, "--windows", "2", "--length", "16"]
        assert run("evaluate", packed, *options)[0] == 0
        loaded = AutoModelForCausalLM.from_pretrained(packed)
        assert sum(isinstance(module, PackedLinear) for module in loaded.modules()) == count > 4
        assert loaded.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 13)
        assert float((logits(packed) - expected).abs().max()) <= close * float(expected.abs().max())
        assert run("unpack", packed, "--out", back)[0] == 0
        assert run("verify", back)[0] == 0
        assert json.loads((back / "permprune.json").read_text())["gathers"] == gathers
        if dtype == "fp32":
            weights = "gathered.safetensors" if gathers else "model.safetensors"
            before, after = load_file(pruned / weights), load_file(back / weights)
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert torch.equal(logits(back), expected)


@pytest.mark.parametrize("pruned", [("fold", "2:4")], indirect=True)
def test_what_is_refused(pruned: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "dtype is 'fp8': choose one of fp32, bf16, fp16, int8, int4" in fails(
        "pack", pruned, "--dtype", "fp8", "--out", out
    )
    assert "dtype with --calibration is 'bf16': choose one of int4" in fails(
        "pack", pruned, "--calibration", pruned / "permprune.json", "--out", out
    )
    assert "holds no permprune.json" in fails("pack", tiny_checkpoint, "--out", out)
    assert "is not packed" in fails("unpack", pruned, "--out", out)
    assert "exists" in fails("pack", pruned, "--out", pruned)
    assert run("pack", pruned, "--out", out)[0] == 0
    assert "is packed already" in fails("pack", out, "--out", tmp_path / "again")
    for folder, command in ((pruned, "pack"), (out, "unpack")):
        probe = load_file(folder / "probe.safetensors")
        save_file(probe | {"input_ids": probe["input_ids"] + 10**6}, folder / "probe.safetensors")
        assert "does not run on the examples" in fails(command, folder, "--out", tmp_path / "again")
        save_file(probe, folder / "probe.safetensors")
    weights = out / "packed.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "does not load" in fails("evaluate", out)
    assert "does not load" in fails("unpack", out, "--out", tmp_path / "again")
    record = json.loads((pruned / "permprune.json").read_text())
    record["layers"][0]["pattern"] = "1:4"
    (pruned / "permprune.json").write_text(json.dumps(record))
    assert "does not hold 1:4" in fails("pack", pruned, "--out", tmp_path / "again")


def test_int4_values_are_solved_on_the_data_of_the_search(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    command = ["prune", tiny_checkpoint, "--calibration", tiny_text, "--data", tiny_text, "--length", "16"]
    command += ["--samples", "24", "--windows", "4", "--order", "ria", "--train", "steps=9:rate=0.02"]
    pruned, packed, later = map(tmp_path.joinpath, "abc")
    assert run(*command, "--out", pruned)[0] == 0
    code, _, stderr = run(*command, "--pack", "int4", "--out", packed)
    assert code == 0, stderr
    pack_folder(pruned, later, dtype="int4", calibration=PruneConfig(calibration=str(tiny_text), length=16, samples=24))
    one, other = (load_file(folder / "packed.safetensors") for folder in (packed, later))
    assert one.keys() == other.keys() and all(torch.equal(one[name], weight) for name, weight in other.items())
    value = permprune.evaluate(str(packed), permprune.Evaluation(str(tiny_text), windows=4, length=16)).value
    before, measured, unmeasured = (read_record(folder).measured for folder in (pruned, packed, later))
    assert before and measured and unmeasured == before
    assert measured.pruned == pytest.approx(value, rel=1e-5) != pytest.approx(before.pruned, rel=1e-5)
    assert measured.packed == "int4" and measured.dense == before.dense
    note = "The perplexity is that of before the weights were packed as int4."
    assert [note in (folder / "README.md").read_text() for folder in (pruned, packed, later)] == [False, False, True]
