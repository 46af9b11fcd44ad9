"""Weights inside the blocks that nothing prunes: every run says which, and so do verify, the record and the report."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf

from permprune import prune, verify
from permprune.models.layers import block_linears, dense_weights

from ..cli.running import run
from ..coupling.coupling_models import gpt_oss, mixtral, qwen3_moe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("pictureless")]

SMALL = ("--samples", "6", "--length", "16", "--windows", "1")
MIXTRAL = [
    "model.layers.*.mlp.gate.weight",
    "model.layers.*.mlp.experts.gate_up_proj",
    "model.layers.*.mlp.experts.down_proj",
]
FAMILIES = {"mixtral": mixtral, "qwen3-moe": qwen3_moe, "gpt-oss": gpt_oss}
TOKENS = torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(0))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for record in caplog.records if "stay dense" in (message := record.getMessage())]


def zeros(weight: torch.Tensor) -> int:
    return int((weight == 0).sum())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["fold", "gather"])
def test_the_library_says_which_experts_stay_dense(family: str, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    model = FAMILIES[family]().float()
    pruned = prune(model, permute="ria", mode=mode, examples=TOKENS)
    inside = [p for name, p in model.named_parameters() if ".layers." in name and p.dim() > 1 and "bias" not in name]
    share = 1 - sum(map(zeros, inside)) / sum(p.numel() / 2 for p in inside)  # of the pruned ones half are zeros
    (line,) = said(caplog)
    assert line.startswith(f"{100 * share:.3g} % of the weights inside the blocks stay dense: ")
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        assert f"model.layers.*.mlp.{name}" in line
    dense = pruned.record().dense
    assert dense is not None and dense.share == pytest.approx(share) and str(dense) == line


@pytest.fixture
def experts(tmp_path: Path, tiny_tokenizer: tf.PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "mixtral"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixtral(vocab_size=128).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def arguments(text: Path, *options: str) -> list[str | Path]:
    return ["--calibration", text, "--data", text, *SMALL, *options]


@pytest.mark.parametrize(
    "command",
    [
        ["prune", "--out", "out", "--permute", "ria"],
        ["prune", "--out", "out", "--permute", "ria", "--memory", "430KB"],
        ["compare", "--methods", "none,ria"],
        ["sweep", "--out", "out", "--methods", "none", "--patterns", "2:4,1:4"],
    ],
)
def test_each_run_says_it_once(
    command: list[str],
    experts: Path,
    tiny_text: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(experts.parent)
    code, _, stderr = run(command[0], experts, *command[1:], *arguments(tiny_text))
    assert code == 0, stderr
    assert ("layer by layer" in " ".join(stderr.split())) == ("--memory" in command)
    assert said(caplog) == [f"81.9 % of the weights inside the blocks stay dense: {', '.join(MIXTRAL)}"]
    assert "81.9 % of the weights inside the blocks stay dense" in " ".join(stderr.split())


def test_verify_record_and_report_say_it(experts: Path, tiny_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("prune", experts, "--out", out, "--permute", "ria", *arguments(tiny_text))
    record = json.loads((out / "permprune.json").read_text())
    assert record["dense"] == {"share": pytest.approx(0.819, abs=1e-3), "layers": MIXTRAL}
    line = f"81.9 % of the weights inside the blocks stay dense: {', '.join(MIXTRAL)}"
    assert f"{line}." in (out / "report.html").read_text()
    assert line in run("verify", out)[1].splitlines()
    del record["dense"]  # as older records have it
    (out / "permprune.json").write_text(json.dumps(record))
    assert line in run("verify", out)[1].splitlines()


def test_layers_that_a_person_left_out_are_not_counted_among_them(
    experts: Path, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exclude = ("--exclude", "*.0.*")
    for folder in (tiny_checkpoint, experts):
        out = tmp_path / f"{folder.name}-pruned"
        run("prune", folder, "--out", out, "--permute", "ria", *arguments(tiny_text, *exclude))
        assert not any("self_attn" in line for line in said(caplog))
        assert verify(out).dense.layers == (MIXTRAL if folder == experts else [])
    assert len(said(caplog)) == 1


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 4)
        self.conv = torch.nn.Conv1d(4, 4, 3)
        self.depthwise = torch.nn.Conv1d(8, 8, 3, groups=8)
        self.positions = torch.nn.Embedding(5, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.scale = torch.nn.Parameter(torch.ones(1, 1, 8))
        self.position_bias_table = torch.nn.Parameter(torch.ones(5, 8))
        self.experts = torch.nn.ParameterList([torch.ones(2, 2) for _ in range(2)])


def test_vectors_biases_and_embeddings_are_no_dense_weights() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.ModuleList([Block(), Block()]))
    dense = dense_weights(model, [layer.name for layer in block_linears(model)])
    assert dense.layers == ["1.*.conv.weight", "1.*.depthwise.weight", "1.*.experts.*"]
    assert dense.share == pytest.approx(1 - 32 / (32 + 48 + 24 + 8))
    assert dense_weights(torch.nn.Linear(2, 2), []).share == 0
