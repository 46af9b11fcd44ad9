"""Weights inside the blocks that nothing prunes: every run says which, and so do verify, the record and the report."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf

from permprune import PermpruneError, prune, verify
from permprune.models.layers import block_linears, dense_weights

from ..cli.running import run
from ..coupling.coupling_models import GROUPED, gpt_oss, mixtral, qwen3_moe

pytestmark = pytest.mark.slow

SMALL = ("--samples", "6", "--length", "16", "--windows", "1")
LLAMA4 = ["model.layers.*.feed_forward.experts.gate_up_proj", "model.layers.*.feed_forward.experts.down_proj"]
LINE = f"64 % of the weights inside the blocks stay dense: {', '.join(LLAMA4)}"
ROUTER = ("*.router",)
"""The router is a linear layer that returns two tensors."""

TOKENS = torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(0))


def llama4(vocabulary: int = 64) -> tf.PreTrainedModel:
    """Experts that run outside of Transformers' interface for experts."""
    experts = {"num_local_experts": 3, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}
    settings = {**GROUPED, "head_dim": 8, **experts, "vocab_size": vocabulary}
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**settings))


FAMILIES = {
    "mixtral": (mixtral, (), ["model.layers.*.mlp.gate.weight"]),
    "qwen3-moe": (qwen3_moe, (), ["model.layers.*.mlp.gate.weight"]),
    "gpt-oss": (gpt_oss, (), ["model.layers.*.mlp.router.weight"]),
    "llama4": (llama4, ROUTER, LLAMA4),
}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for record in caplog.records if "stay dense" in (message := record.getMessage())]


def zeros(weight: torch.Tensor) -> int:
    return int((weight == 0).sum())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["fold", "gather"])
def test_the_library_says_what_stays_dense(family: str, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    build, exclude, names = FAMILIES[family]
    model = build().float()
    pruned = prune(model, order="ria", mode=mode, examples=TOKENS, exclude=exclude)
    inside = {name: p for name, p in model.named_parameters() if ".layers." in name and p.dim() > 1}
    inside = {name: p for name, p in inside.items() if "bias" not in name}
    total, left = sum(p.numel() for p in inside.values()), exclude and 2 * 3 * 32
    share = 1 - (2 * sum(map(zeros, inside.values())) + (left or 0)) / total  # of the pruned ones half are zeros
    (line,) = said(caplog)
    assert line == f"{100 * share:.3g} % of the weights inside the blocks stay dense: {', '.join(names)}"
    dense = pruned.record().dense
    assert dense is not None and dense.share == pytest.approx(share) and str(dense) == line


def test_a_layer_that_returns_more_than_a_tensor_is_refused() -> None:
    with pytest.raises(PermpruneError, match=r"feed_forward\.router is a Llama4Router, .*: exclude it"):
        prune(llama4(), order="ria", examples=TOKENS)


@pytest.fixture
def experts(tmp_path: Path, tiny_tokenizer: tf.PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "llama4"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama4(128).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def arguments(text: Path, *exclude: str) -> list[str | Path]:
    options = [option for glob in exclude for option in ("--set", f"exclude={glob}")]
    return ["--calibration", text, "--data", text, *SMALL, *options]


@pytest.mark.parametrize(
    "command",
    [
        ["prune", "--out", "out", "--order", "ria"],
        ["compare", "--out", "out", "--methods", "none", "--patterns", "2:4,1:4"],
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
    code, _, stderr = run(command[0], experts, *command[1:], *arguments(tiny_text, *ROUTER))
    assert code == 0, stderr
    assert said(caplog) == [LINE]
    assert LINE.partition(":")[0] in " ".join(stderr.split())


def test_a_run_that_offloads_says_it_once(
    tiny_tokenizer: tf.PreTrainedTokenizerFast, tiny_text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "mixtral"
    mixtral(vocab_size=128).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    out = ("--out", tmp_path / "out", "--order", "ria", "--set", "offload=disk")
    code, _, stderr = run("prune", folder, *out, *arguments(tiny_text))
    assert code == 0, stderr
    assert said(caplog) == ["0.565 % of the weights inside the blocks stay dense: model.layers.*.mlp.gate.weight"]


def test_verify_record_and_report_say_it(experts: Path, tiny_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("prune", experts, "--out", out, "--order", "ria", *arguments(tiny_text, *ROUTER))
    record = json.loads((out / "permprune.json").read_text())
    assert record["dense"] == {"share": pytest.approx(0.64, abs=1e-3), "layers": LLAMA4}
    assert f"{LINE}." in (out / "report.html").read_text()
    assert LINE in run("verify", out)[1].splitlines()
    del record["dense"]  # as older records have it
    (out / "permprune.json").write_text(json.dumps(record))
    assert LINE in run("verify", out)[1].splitlines()


def test_layers_that_a_person_left_out_are_not_counted_among_them(
    experts: Path, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in (tiny_checkpoint, experts):
        out = tmp_path / f"{folder.name}-pruned"
        exclude = ("*.0.*", *(ROUTER if folder == experts else ()))
        run("prune", folder, "--out", out, "--order", "ria", *arguments(tiny_text, *exclude))
        assert not any("self_attn" in line for line in said(caplog))
        assert verify(out).dense.layers == (LLAMA4 if folder == experts else [])
    assert len(said(caplog)) == 1


def test_single_experts_are_left_out_and_counted() -> None:
    model = mixtral()
    layers = [layer.name for layer in block_linears(model)]
    without = [name for name in layers if ".experts.1." not in name]
    router = ["model.layers.*.mlp.gate.weight"]
    assert dense_weights(model, without, ["*.experts.1.*"]).layers == router
    left = dense_weights(model, without)
    names = ["model.layers.*.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.down_proj"]
    assert left.layers == [*router, *names]
    added = left.share - dense_weights(model, layers).share
    sizes = [p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() > 1]
    assert added == pytest.approx(2 * 3 * 32 * 48 / sum(sizes))


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
