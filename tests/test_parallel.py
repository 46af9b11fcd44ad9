"""Two processes find what one finds; the command runs under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from permprune import parallel

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "permprune"]


def test_alone_nothing_is_shared() -> None:
    tensor = torch.ones(2)
    parallel.add_([tensor])
    parallel.wait()
    assert parallel.rank() == 0 and parallel.world() == 1
    assert list(parallel.share(range(3))) == [0, 1, 2]
    assert parallel.total(1.5, 2) == (1.5, 2) and parallel.mean(3.0) == 3.0
    assert parallel.merge({"a": 1}) == {"a": 1} and tensor.tolist() == [1, 1]


def test_threads_answer_in_order_and_give_the_threads_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inside = list(parallel.each(lambda i: (i, torch.get_num_threads()), range(20), torch.device("cpu")))
        assert [i for i, _ in inside] == list(range(20)) and {threads for _, threads in inside} == {1}
        with pytest.raises(ZeroDivisionError):
            list(parallel.each(lambda i: 1 // i, range(3), torch.device("cpu")))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["newton", "learned", "reconstruction"])
def test_two_processes_find_what_one_finds(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, method: str) -> None:
    options = [
        "prune",
        str(tiny_checkpoint),
        "--calibration",
        str(tiny_text),
        "--data",
        str(tiny_text),
        "--length",
        "16",
    ]
    options += ["--samples", "40", "--windows", "4", "--precision", "fp32", "--permute", method, "--mode", "gather"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    records = []
    for launcher in ([sys.executable, "-m", "permprune"], TORCHRUN):
        out = tmp_path / str(len(records))
        run = subprocess.run(
            [*launcher, *options, "--out", str(out)], env=environment, capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("written to") == 1
        records.append(json.loads((out / "permprune.json").read_text()))
    one, two = records
    assert one["permutations"] == two["permutations"] and one["gathers"] == two["gathers"]
    assert [p["loss"] for p in one["curve"]] == pytest.approx([p["loss"] for p in two["curve"]], abs=1e-6)
    assert one["measured"]["pruned"] == pytest.approx(two["measured"]["pruned"], rel=1e-6)


def test_an_error_is_said_once_and_ends_all_processes(tmp_path: Path) -> None:
    command = [*TORCHRUN, "prune", "smollm2-135m", "--pattern", "24", "--out", str(tmp_path / "out")]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert run.returncode != 0
    assert run.stderr.count("is no N:M pattern") == 1
