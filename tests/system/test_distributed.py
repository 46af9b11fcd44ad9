"""Two processes find what one finds; the command runs under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from permprune.system import distributed
from permprune.system.files import WorkFolder

from ..cli.running import run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "permprune"]


def test_alone_nothing_is_shared() -> None:
    tensor = torch.ones(2)
    distributed.add_([tensor])
    distributed.wait()
    assert distributed.rank() == 0 and distributed.world() == 1
    assert list(distributed.share(range(3))) == [0, 1, 2]
    assert distributed.total(1.5, 2) == (1.5, 2) and distributed.mean(3.0) == 3.0
    assert distributed.on_first(lambda: 4) == 4 and distributed.common("ab") == {"a", "b"}
    assert distributed.merge({"a": 1}) == {"a": 1} and tensor.tolist() == [1, 1]


def test_threads_answer_in_order_and_give_the_threads_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inside = list(distributed.each(lambda i: (i, torch.get_num_threads()), range(20), torch.device("cpu")))
        assert [i for i, _ in inside] == list(range(20)) and {threads for _, threads in inside} == {1}
        with pytest.raises(ZeroDivisionError):
            list(distributed.each(lambda i: 1 // i, range(3), torch.device("cpu")))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["newton:rounds=4", "learned:rounds=4", "reconstruction"])
def test_two_processes_find_what_one_finds(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, method: str) -> None:
    options = ["prune", tiny_checkpoint, "--calibration", tiny_text, "--data", tiny_text, "--length", "16"]
    options += ["--samples", "40", "--windows", "4", "--precision", "fp32", "--permute", method, "--mode", "gather"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run(*options, "--out", tmp_path / "0")[0] == 0
    finally:
        torch.set_num_threads(threads)
    two_processes = [*TORCHRUN, *map(str, options), "--out", str(tmp_path / "1")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(two_processes, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("written to") == 1
    records = [json.loads((tmp_path / out / "permprune.json").read_text()) for out in ("0", "1")]
    one, two = records
    assert one["permutations"] == two["permutations"] and one["gathers"] == two["gathers"]
    assert [p["loss"] for p in one["curve"]] == pytest.approx([p["loss"] for p in two["curve"]], abs=1e-6)
    assert one["measured"]["pruned"] == pytest.approx(two["measured"]["pruned"], rel=1e-6)


def test_an_error_of_one_process_is_said_once_and_ends_all(tmp_path: Path) -> None:
    command = [*TORCHRUN, "prune", "smollm2-135m", "--out", str(tmp_path / "out")]
    with WorkFolder(tmp_path / "out").held("prune", resume=False):
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    assert ended.returncode != 0
    assert ended.stderr.count("another run is writing") == 1
