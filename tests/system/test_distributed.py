"""Two processes find what one finds; the command runs under torchrun."""

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from permprune.cli import app
from permprune.errors import PermpruneError
from permprune.system import distributed
from permprune.system.failures import OutOfMemory, failures_reported
from permprune.system.files import WorkFolder, write_whole

from ..cli.running import run
from ..forked import forked
from ..processes import in_processes


def test_alone_nothing_is_shared() -> None:
    tensor = torch.ones(2)
    distributed.add_([tensor])
    distributed.wait()
    assert distributed.rank() == 0 and distributed.world() == 1
    assert list(distributed.share(range(3))) == [0, 1, 2]
    assert distributed.total(1.5, 2) == (1.5, 2) and distributed.mean(3.0) == 3.0
    assert distributed.on_first(lambda: 4) == 4
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


def test_ranks_wait_as_long_as_the_first_one_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, timedelta] = {}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda _, **given: options.update(given))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with distributed.processes():
        pass
    assert options["timeout"] >= timedelta(days=1)


CASES = [
    ["--order", "learned:rounds=2", "--mode", "gather"],
    ["--order", "newton:rounds=1", "--mode", "fold"],
]
DIVIDED = CASES[1]
"""In this case the two processes divide the rows of the weights; in the other each holds the whole model."""


def launch(folder: Path) -> None:
    """Start two processes as `torchrun` does, forked from one that has imported what they need."""
    logs = DefaultLogsSpecs(log_dir=str(folder / "logs"), redirects=Std.ALL)
    config = LaunchConfig(
        1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork", logs_specs=logs
    )
    elastic_launch(config, commands_of_rank)(folder)


def commands_of_rank(folder: Path) -> None:
    """Run one command after the other; {rank} is replaced in their arguments."""

    def write_late(*arguments: Any) -> None:
        time.sleep(0.5)
        write_whole(*arguments)

    codes = []
    with distributed.processes(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("permprune.report.run._pictures", lambda _: {})
        patch.setattr("permprune.system.search_state.write_whole", write_late)  # while the other process goes on
        for arguments in json.loads((folder / "commands.json").read_text()):
            try:
                app([argument.replace("{rank}", os.environ["RANK"]) for argument in arguments])
            except SystemExit as ended:
                codes.append(ended.code)
    (folder / f"codes-{os.environ['RANK']}.json").write_text(json.dumps(codes))


@pytest.mark.slow
def test_two_processes_find_what_one_finds_and_say_an_error_once(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    shared = ["prune", str(tiny_checkpoint), "--calibration", str(tiny_text), "--data", str(tiny_text)]
    shared += ["--length", "16", "--samples", "40", "--windows", "4", "--set", "precision=fp32", "--set", "batch=4"]
    shared += ["--set", "seed=1"]
    alone, both = ([tmp_path / f"{count} {number}" for number in range(len(CASES))] for count in (1, 2))
    commands = [
        [*shared, *case, "--out", str(out), "--set", f"shard={str(case is DIVIDED).lower()}"]
        for case, out in zip(CASES, both, strict=True)
    ]
    commands += [["compare", *shared[1:], "--patterns", "2:4", "--methods", "none", "--out", str(tmp_path / "swept")]]
    faulty = [["--out", "held"], ["--out", "unlike", "--set", "seed={rank}"]]
    commands += [[*shared, *options[:1], str(tmp_path / options[1]), *options[2:]] for options in faulty]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # also of the processes that are started
    try:
        for case, out in zip(CASES, alone, strict=True):
            assert run(*shared, *case, "--out", out)[0] == 0
        with WorkFolder(tmp_path / "held").held("prune", resume=False):
            assert forked(launch, tmp_path) == (0, None)
    finally:
        torch.set_num_threads(threads)
    stdout, stderr = (
        "".join(path.read_text() for path in tmp_path.glob(f"logs/**/{name}.log")) for name in ("stdout", "stderr")
    )
    codes = [json.loads((tmp_path / f"codes-{rank}.json").read_text()) for rank in (0, 1)]
    assert codes == [[0, 0, 0, 2, 2]] * 2, stderr
    assert stdout.count("written to") == 3
    assert stderr.count("the 2 processes divide the rows of the weights") == 1
    assert stderr.count("another run is writing") == 1
    assert stderr.count("the processes of this run differ in seed: ") == 1
    assert run("verify", both[CASES.index(DIVIDED)])[0] == 0
    for folders in zip(alone, both, strict=True):
        one, two = (json.loads((folder / "permprune.json").read_text()) for folder in folders)
        assert one["permutations"] == two["permutations"] and one["gathers"] == two["gathers"]
        assert [p["loss"] for p in one["curve"]] == pytest.approx([p["loss"] for p in two["curve"]], abs=1e-6)
        assert one["measured"]["pruned"] == pytest.approx(two["measured"]["pruned"], rel=1e-6)


def test_ranks_that_differ_are_refused_and_an_error_of_one_is_raised_on_all() -> None:
    def differ() -> str:
        with pytest.raises(PermpruneError) as raised:
            distributed.require_same({"mode": "fold", "seed": distributed.rank() % 2})
        return str(raised.value)

    def fail() -> str:
        def once() -> None:
            if distributed.rank() == 1:
                raise PermpruneError("no disk")

        with pytest.raises(PermpruneError) as raised:
            distributed.on_all(once)
        return str(raised.value)

    refused = "the processes of this run differ in seed: start all with the same command and files"
    assert in_processes(3, differ) == [refused] * 3
    assert in_processes(2, fail) == ["no disk"] * 2
    distributed.require_same({"seed": 0})


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:549] Connection closed by peer [127.0.0.1]:59271"),
        torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:94, remote process exited"),
    ],
)
def test_a_lost_connection_is_one_line(error: RuntimeError) -> None:
    with pytest.raises(PermpruneError, match="another process of this run has ended"), failures_reported():
        raise error


def test_another_error_of_torch_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="invalid shape"), failures_reported():
        raise RuntimeError("invalid shape")


def test_memory_that_runs_out_in_a_collective_operation_is_said_to() -> None:
    with pytest.raises(OutOfMemory, match="out of memory"), failures_reported():
        raise torch.distributed.DistBackendError("NCCL error: unhandled cuda error, out of memory")
