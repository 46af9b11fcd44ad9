"""What is checked before torch is imported, and wrong usage: a line on stderr, in a fraction of a second."""

import json
import os
import stat
import subprocess
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest

from permprune.data.sources import require_source
from permprune.errors import PermpruneError
from permprune.evaluation.metrics import OF_CLASSES, OF_SCORES
from permprune.evaluation.result import LABEL_METRICS
from permprune.inference.pack import packed_type
from permprune.options import PACKED
from permprune.zoo.models import MODELS, require_model

from .running import COMMAND, fails, run

WRONG = {
    "prune smollm2-135m --out out --pattern 4:2": 'pattern "4:2" keeps no or all weights',
    "prune smollm2-135m --out out --pattern mixed --keep 0.6 --bytes 90MB": "--keep and --bytes are two budgets",
    "prune smollm2-135m --out out --pattern mixed --bytes much": "is not an amount of memory",
    "prune smollm2-135m --out out --pattern mixed --max-loss much": "give a share",
    "prune smollm2-135m --out out --pattern mixed --max-loss 1%": "give them with --data",
    "prune smollm2-135m --out out --pattern mixed --keep 0.1": "keep more, or give a sparser candidate",
    "prune smollm2-135m --out out --pattern mixed --candidates 2:4": "two candidates or more",
    "prune smollm2-135m --out out --keep 0.6": "--keep is for a mix of patterns",
    "prune smollm2-135m --out out --order newtn": 'did you mean "newton"',
    "prune smollm2-135m --out out --order newton:rounds=x": "rounds is 'x': give a whole number",
    "prune smollm2-135m --out out --set saliency=wand": 'did you mean "wanda"',
    "prune smollm2-135m --out out --update admm:damping=-1": "damping is -1",
    "prune smollm2-135m --out out --effort hours": 'did you mean "hour"',
    "prune smollm2-135m --out out --set precision=fp8": "precision is 'fp8'",
    "prune smollm2-135m --out out --mode fld": 'did you mean "fold"',
    "prune smollm2-135m --out out --set metric=pearsn": 'did you mean "pearson"',
    "prune smollm2-135m --out out --pack fp4": "pack is 'fp4'",
    "prune smollm2-135m --out out --head int8": "give pack too",
    "prune smollm2-135m --out out --pack int8 --head int3": "head is 'int3'",
    "prune smollm2-135m --out out --order newton:start=learned": "start of newton is 'learned'",
    "prune smollm2-135m --out out --windows 0": "windows is 0",
    "prune smollm2-135m --out out --data none.txt": "no data at none.txt",
    "prune smollm2-135m --out out --data empty.txt": "empty.txt is empty",
    "prune smollm2-135m --out out --calibration empty": "empty is an empty folder",
    "prune smollm2-135m --out full": "full exists already",
    "prune smollm2-135m --out no/out": "there is no folder",
    "prune smollm2 --out out": 'did you mean "smollm2-135m"',
    "prune full --out out": "full holds no config.json",
    "prune empty.txt --out out": "is a file: give the model's folder",
    "compare smollm2-135m --methods ria,newtons": 'did you mean "newton"',
    "compare smollm2-135m --json empty": "is not a file",
    "compare smollm2-135m --out out --patterns 2:4,x": '"x" is not an N:M pattern',
    "compare smollm2-135m --out out --patterns mixed@much": "keeps no share of the weights",
    "compare smollm2-135m --out out --patterns mixed@0.2": "keep more",
    "compare smollm2-135m --out out --budgets 0": "budgets is 0.0",
    "evaluate smollm2-135m --tasks cb --limit 0": "limit is 0",
    "evaluate smollm2-135m --limit 2": "name some with --tasks",
    "evaluate smollm2-135m --tasks cb --metric f1": "leave out --data, --metric",
    "evaluate smollm2-135m --tasks cb --windows 4": "leave out --data, --metric, --windows",
    "evaluate smollm2-135m --kv nowhere": "there is no folder nowhere",
    "finetune smollm2-135m --out out --train heads": 'did you mean "head"',
    "finetune smollm2-135m --out out --teacher smollm2": 'did you mean "smollm2-135m"',
    "kv smollm2-135m --out out --order newton": "orders the channels of weights, not of a cache",
    "kv smollm2-135m --out out --dtype int6": "dtype is 'int6'",
    "plan smollm2-135m --gpu h101": 'did you mean "h100"',
    "pack full --out out --dtype int3": "dtype is 'int3'",
    "pack nowhere --out out": "there is no folder nowhere",
    "unpack nowhere --out out": "there is no folder nowhere",
    "verify nowhere": "there is no folder nowhere",
    "bench full --batch 1,x": "give whole numbers",
    "bench full --turns 0": "turns is 0",
    f"prune {'x' * 5000} --out out": "model cannot be looked for: File name too long",
    f"prune smollm2-135m --out out --data {'y/' * 3000}": "data cannot be looked for: File name too long",
    "compare smollm2-135m --methods ,": "--methods names none",
    "fetch smollm": 'did you mean "smollm2-135m"',
}
"""Wrong command lines, and a part of their messages."""

SCRIPT = """
import sys
from contextlib import redirect_stderr
from io import StringIO
from typer.main import get_command
from permprune.cli import app
program = get_command(app)
for line in sys.stdin.read().splitlines():
    with redirect_stderr(StringIO()) as said:
        try:
            program.main(line.split(), prog_name="permprune")
        except SystemExit as ended:
            assert ended.code == 2, (line, ended.code)
    heavy = [name for name in ("torch", "transformers") if name in sys.modules]
    print(*said.getvalue().splitlines(), *heavy, sep="; ")
"""


def test_wrong_command_lines_are_refused_without_torch(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    command = [sys.executable, "-c", SCRIPT]
    ran = subprocess.run(command, input="\n".join(WRONG), cwd=tmp_path, text=True, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    for (command_line, expected), line in zip(WRONG.items(), lines, strict=True):
        assert line.startswith("permprune: ") and expected in line and "; " not in line, (command_line, line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "empty.txt", "full"]


def test_the_choices_that_are_checked_are_those_that_there_are() -> None:
    assert len({packed_type(name) for name in PACKED}) == len(PACKED)
    assert ["accuracy", *OF_CLASSES, *OF_SCORES] == [*LABEL_METRICS]


@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "t5-small", "owner/smollm2", "distilgpt2", *MODELS])
def test_names_on_the_hub_are_no_misspelt_zoo_names(name: str) -> None:
    require_model(name)


@pytest.mark.parametrize("name", ["smollm", "SmolLM2-135M", "smollm2-135", "minilm-l"])
def test_a_misspelt_zoo_name_is_corrected(name: str) -> None:
    with pytest.raises(PermpruneError, match="did you mean"):
        require_model(name)


def test_sources_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.txt").write_text("a")
    for source in ("imdb", "imdb:plain@train", "stas/openwebtext-10k", "folder", "./folder@train", "folder/train.txt"):
        require_source(source)
    with pytest.raises(PermpruneError, match="is empty: give a file, a folder"):
        require_source("")
    os.mkfifo("pipe")
    with pytest.raises(PermpruneError, match="neither a file nor a folder"):
        require_source("pipe")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["prune", "x", "--smples", "3"], 'no option --smples: did you mean "--samples"?'),
        (["prune", "x", "--zzz"], "no option --zzz: see permprune prune --help"),
        (["-q", "prune"], "no option -q"),
        (["prun"], "no such command 'prun': did you mean 'prune'?"),
        (["prune"], "missing argument"),
        (["prune", "x"], "missing option '--out'"),
        (["prune", "x", "--out"], "option '--out' requires an argument"),
        (["verify", "a", "b"], "got unexpected extra argument"),
        (["evaluate", "x", "--windows", "many"], "invalid value for '--windows'"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], line: str) -> None:
    assert fails(*arguments).startswith(f"permprune: {line}")


def test_the_program_alone_shows_its_help() -> None:
    code, stdout, stderr = run()
    assert code == 2 and "Usage" in stdout and not stderr


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_json_on_stdout(
    name: str, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--calibration", tiny_text, "--data", tiny_text, "--length", "16", "--samples", "24", "--windows", "2"]
    code, stdout, stderr = run("compare", tiny_checkpoint, *options, "--methods", "ria", "--json", name)
    assert code == 0 and [row["method"] for row in json.loads(stdout)["rows"]] == ["none", "ria"]
    assert "perplexity" in stderr and not (tmp_path / "-").exists()


def test_json_on_a_closed_stdout(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    stderr = StringIO()
    with redirect_stderr(stderr), pytest.raises(SystemExit) as ended:
        COMMAND.main(["evaluate", str(tiny_checkpoint), "--json", "-"], prog_name="permprune")
    assert (ended.value.code, stderr.getvalue()) == (2, "permprune: stdout is closed: give --json a file\n")


def test_files_follow_the_umask(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    data = ["--calibration", tiny_text, "--data", tiny_text, "--length", "16", "--samples", "24", "--windows", "2"]
    before = os.umask(0o027)
    try:
        assert run("prune", tiny_checkpoint, *data, "--order", "ria", "--out", tmp_path / "out")[0] == 0
        assert run("pack", tmp_path / "out", "--out", tmp_path / "packed")[0] == 0
        assert run("evaluate", tiny_checkpoint, *data[2:6], "--windows", "2", "--json", tmp_path / "one.json")[0] == 0
    finally:
        os.umask(before)
    for folder in (tmp_path / "out", tmp_path / "packed"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert len(modes) > 6 and set(modes.values()) == {0o640}, modes
    assert stat.S_IMODE((tmp_path / "one.json").stat().st_mode) == 0o640


def test_a_working_directory_that_was_removed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"import os; os.rmdir({str(gone)!r}); from permprune.__main__ import main; main()"
    for command in (["verify", "out"], ["prune", str(tiny_checkpoint), "--out", "out"]):
        ran = subprocess.run([sys.executable, "-c", script, *command], cwd=gone, text=True, capture_output=True)
        gone.mkdir()
        assert ran.returncode == 2
        assert ran.stderr.splitlines() == [
            "permprune: the working directory does not exist any more: change to another one"
        ]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("changes", "options", "line"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, [], "the weights are packed or quantized"),
        ({"vocab_size": 0}, [], "vocab_size is 0"),
        ({}, ["--samples", "1"], "the calibration has 1 examples, but needs at least 3"),
        ({}, ["--length", "1"], "length is 1: give a whole number from 2"),
    ],
)
def test_plan_refuses_what_prune_refuses(
    changes: dict[str, object], options: list[str], line: str, tiny_checkpoint: Path
) -> None:
    config = tiny_checkpoint / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    assert line in fails("plan", tiny_checkpoint, "--length", "16", *options)
