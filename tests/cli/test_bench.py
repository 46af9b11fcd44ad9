"""`permprune bench`, and `permprune prune --pack`."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from permprune import PermpruneError, bench
from permprune.checkpoints.record import read_record
from permprune.system.device import best_device, fast_dtype

from ..forked import forked
from .running import fails, run

SMALL = ("--samples", "8", "--length", "16", "--windows", "2", "--order", "none")


@pytest.mark.slow
@pytest.mark.usefixtures("with_pictures")
def test_packed_weights_are_written_measured_and_shown(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    packed, figures = tmp_path / "packed", tmp_path / "bench.json"
    data = ("--calibration", tiny_text, "--data", tiny_text)
    run("prune", tiny_checkpoint, "--out", packed, "--pack", "bf16", *SMALL, *data)
    assert read_record(packed).extra["packed"]["dtype"] == "bf16"
    run("verify", packed)
    run("kv", packed, "--out", tmp_path / "kv", "--samples", "2", "--length", "16", "--windows", "1", *data)
    sizes = (
        "--kv",
        tmp_path / "kv",
        "--batch",
        "1,2",
        "--context",
        "8",
        "--steps",
        "2",
        "--turns",
        "1",
        "--threads",
        "1",
    )
    _, said, warned = run("bench", packed, *sizes, "--json", figures)
    assert "of the size of the smallest dense model" in said and "batch 2, context 8" in said
    found = json.loads(figures.read_text())
    names = [row["name"] for row in found["rows"]]
    dense, kv = f"{tiny_checkpoint} (bf16)", tmp_path / "kv"
    assert names == [f"{tiny_checkpoint} (fp32)", dense, str(packed), f"{packed} with {kv}"]
    assert f"{dense} with {kv} is not measured: {kv} is for".replace(" ", "") in "".join(warned.split())
    assert [row["dense"] for row in found["rows"]] == [True, True, False, False]
    assert found["rows"][2]["bytes"] <= found["rows"][1]["bytes"] < found["rows"][0]["bytes"]  # rows are half a block
    assert all(len(row["speeds"]) == 2 and row["resident"] > 10**7 for row in found["rows"])
    bench = read_record(packed).bench
    assert bench is not None and [row.name for row in bench.rows] == names
    run("unpack", packed, "--out", tmp_path / "zeros")
    assert "this model has other weights" in fails("bench", tmp_path / "zeros", *sizes)
    assert read_record(tmp_path / "zeros").bench is None


@pytest.mark.slow
def test_a_model_that_fails_is_named_in_one_line(tiny_vit: Path) -> None:
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 24}}
    (tiny_vit / "preprocessor_config.json").write_text(json.dumps(settings))
    small = ("--batch", "1", "--turns", "1", "--threads", "1")
    line = fails("bench", tiny_vit, "--dense", tiny_vit, *small)
    assert f"{tiny_vit} (fp32) cannot be measured: " in line and "8*24" in line


@pytest.mark.slow
def test_models_that_generate_nothing_are_measured_in_inputs_a_second(tiny_vit: Path, tmp_path: Path) -> None:
    figures = tmp_path / "bench.json"
    small = ("--batch", "1,3", "--turns", "1", "--threads", "1", "--json", figures)
    _, said, _ = run("bench", tiny_vit, "--dense", tiny_vit, *small)
    assert "items/s" in said and f"{tiny_vit}: " in said
    found = json.loads(figures.read_text())["rows"]
    faster = [f"{tiny_vit} (bf16)"] if fast_dtype(best_device()) == torch.bfloat16 else []
    assert [row["name"] for row in found if not row["dense"]] == [str(tiny_vit), *faster]
    for row in found:
        assert [(speed["batch"], speed["context"]) for speed in row["speeds"]] == [(1, 0), (3, 0)]


def test_numbers_and_folders_that_are_none_are_refused(tiny_checkpoint: Path) -> None:
    assert "give whole numbers, separated by commas" in fails("bench", tiny_checkpoint, "--batch", "1,x")
    assert "batches is 0" in fails("bench", tiny_checkpoint, "--batch", "0")
    assert "names the dense model: give it with --dense" in fails("bench", tiny_checkpoint)
    missing = ("--dense", tiny_checkpoint, "--kv", tiny_checkpoint)
    assert "holds no kv.json: give a folder that permprune kv wrote" in fails("bench", tiny_checkpoint, *missing)
    with pytest.raises(PermpruneError, match='folders is "pruned": give a list of folders'):
        bench("pruned")
    with pytest.raises(PermpruneError, match="threads is 0"):
        bench(["pruned"], dense="dense", threads=0)


def test_what_cannot_be_packed_is_refused_before_the_work(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "pack is 'int3': did you mean" in fails("prune", tiny_checkpoint, "--out", out, "--pack", "int3")
    wide = fails("prune", tiny_checkpoint, "--out", out, "--pack", "bf16", "--pattern", "16:32")
    assert "M is at most 16" in wide
    narrow = fails("prune", tiny_checkpoint, "--out", out, "--pack", "int8", "--head", "int8")
    assert "rows of 32 channels cannot be int8" in narrow
    assert not out.exists()


def run_script(path: Path) -> None:
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.slow
def test_a_script_needs_no_guard(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """`bench` does not run the script again in its processes."""
    script, said = tmp_path / "script.py", tmp_path / "said"
    script.write_text(
        f"""
import permprune

def say(line):
    with open({str(said)!r}, "a") as file:
        print(line, file=file)

say("started")
found = permprune.bench([], dense={str(tiny_checkpoint)!r}, batches=[1], contexts=[4], steps=2, turns=1, threads=1)
say(f"{{len(found.rows)}} rows")
"""
    )
    assert forked(run_script, script) == (0, None)
    assert said.read_text().splitlines() == ["started", "2 rows"]
