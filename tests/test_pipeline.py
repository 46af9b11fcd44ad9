"""From a model to a pruned one, and back from disk."""

import copy
import math
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaMLP

from permprune.checkpoints.io import load
from permprune.checkpoints.probe import probe_outputs
from permprune.checkpoints.record import read_record
from permprune.checkpoints.weights import GATHERED
from permprune.config import PruneConfig
from permprune.coupling.discovery import discover
from permprune.coupling.fold import fold, verify_space
from permprune.coupling.space import Coupling
from permprune.data.text import load_documents, tokenize
from permprune.engine.held import Held, prepare, prune
from permprune.engine.measuring import Evaluation
from permprune.errors import PermpruneError
from permprune.evaluation.result import TOP_1_ACCURACY, WORD_ERROR_RATE, gap_closed
from permprune.examples import Examples
from permprune.jobs.compare import compare
from permprune.jobs.evaluate import evaluate
from permprune.jobs.prune import prune_to_folder
from permprune.jobs.verify import verify
from permprune.losses.objective import Objective
from permprune.models.activation_checkpointing import recomputing
from permprune.models.layers import prunable_layers
from permprune.pattern import Pattern
from permprune.permuters.base import Random
from permprune.saliency.metrics import SALIENCIES
from permprune.system.memory import peak_memory_mb, reset_peak_memory

WINDOWS = torch.randint(128, (12, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:4", "8:16", "4:8p"])
@pytest.mark.parametrize("mode", ["fold", "gather"])
def test_the_pruned_model_says_what_the_masked_one_said(tiny_llama: LlamaForCausalLM, mode: str, pattern: str) -> None:
    prepared = prepare(tiny_llama, None, PruneConfig(pattern=pattern, mode=mode, precision="fp32"), examples=WINDOWS)
    natural = prepared.network.measures()
    solution = Random().solve(prepared.network, prepared.run)
    masked = probe_outputs(tiny_llama, {"input_ids": WINDOWS})
    pruned = Held(prepared, None).finish(solution, natural)
    torch.testing.assert_close(probe_outputs(pruned.model, {"input_ids": WINDOWS}), masked, rtol=0, atol=1e-5)
    assert [row.error_none for row in pruned.layers] == [row.error for row in natural]
    for layer in prunable_layers(pruned.model, Pattern.parse(pattern)):
        assert Pattern.parse(pattern).holds(layer.weight)
        assert layer.weight.ne(0).float().mean() == pytest.approx(Pattern.parse(pattern).density, abs=0.01)


@pytest.mark.parametrize("saliency", SALIENCIES)
def test_every_saliency_prunes(tiny_llama: LlamaForCausalLM, saliency: str) -> None:
    dense = copy.deepcopy(tiny_llama)
    pruned = prune(tiny_llama, order="none", examples=WINDOWS, saliency=saliency, precision="fp32")
    for own, before in zip(
        prunable_layers(pruned.model, Pattern(2, 4)), prunable_layers(dense, Pattern(2, 4)), strict=True
    ):
        kept = own.weight.ne(0)
        assert torch.equal(own.weight[kept], before.weight[kept])  # masks only: what is kept is unchanged


@pytest.fixture
def whole_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update is kept, which may do a model without sense no good."""
    monkeypatch.setattr("permprune.recipe.TOLERANCE", -math.inf)


def test_recompute_holds_for_calibration_and_gradients(tiny_llama: LlamaForCausalLM) -> None:
    runs: list[bool] = []
    tiny_llama.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: runs.append(recomputing()))
    for recompute in (False, True):
        prepared = prepare(tiny_llama, None, PruneConfig(precision="fp32", recompute=recompute), examples=WINDOWS)
        assert any(runs) is recompute
        runs.clear()
        prepared.network.gradients(Examples.of(WINDOWS[:2]), Objective())
        assert any(runs) is recompute
        runs.clear()


def test_examples_pass_in_batches(tiny_llama: LlamaForCausalLM) -> None:
    sizes: list[int] = []
    tiny_llama.get_input_embeddings().register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    config = PruneConfig(precision="fp32", samples=12, measured=5, held_out=1, batch=3)
    prepare(tiny_llama, None, config, examples=WINDOWS)
    assert sizes[-2:] == [3, 2]


def test_excluded_layers_stay_dense(tiny_llama: LlamaForCausalLM) -> None:
    before = tiny_llama.model.layers[0].mlp.down_proj.weight.clone()
    prune(tiny_llama, order="none", examples=WINDOWS, precision="fp32", exclude=("*.0.mlp.down_proj",))
    assert torch.equal(tiny_llama.model.layers[0].mlp.down_proj.weight, before)


def test_a_gather_leaves_what_dense_layers_read_as_it_is(tiny_llama: LlamaForCausalLM) -> None:
    settings = PruneConfig(mode="gather", precision="fp32", exclude=("*.k_proj",))  # k reads what q and v read
    prepared = prepare(tiny_llama, None, settings, examples=WINDOWS)
    natural = prepared.network.measures()
    solution = Random().solve(prepared.network, prepared.run)
    masked = probe_outputs(tiny_llama, {"input_ids": WINDOWS})
    pruned = Held(prepared, None).finish(solution, natural)
    torch.testing.assert_close(probe_outputs(pruned.model, {"input_ids": WINDOWS}), masked, rtol=0, atol=1e-5)
    assert {bool(gather.output) for gather in pruned.gathers} == {False, True}


@pytest.fixture
def untraceable(retraced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every LLaMA look at the values that pass through it."""
    plain = LlamaMLP.forward

    def forward(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        return plain(self, x) if x.abs().sum() >= 0 else x

    monkeypatch.setattr(LlamaMLP, "forward", forward)


@pytest.mark.usefixtures("untraceable")
def test_a_model_that_cannot_be_traced_is_pruned_in_gather_mode(
    tiny_llama: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(PermpruneError, match=r"test_pipeline\.py:\d+\).*--mode gather"):
        prepare(tiny_llama, None, PruneConfig(precision="fp32"), examples=WINDOWS)
    prepared = prepare(tiny_llama, None, PruneConfig(mode="gather", precision="fp32"), examples=WINDOWS)
    assert "cannot trace" in caplog.text
    assert sorted(len(problem.parts) for problem in prepared.outline.problems) == [1, 1, 1, 1, 2, 2, 3, 3]
    natural = prepared.network.measures()
    solution = Random().solve(prepared.network, prepared.run)
    masked = probe_outputs(tiny_llama, {"input_ids": WINDOWS})
    pruned = Held(prepared, None).finish(solution, natural)
    torch.testing.assert_close(probe_outputs(pruned.model, {"input_ids": WINDOWS}), masked, rtol=0, atol=1e-5)
    assert len(pruned.gathers) == 8 and not pruned.tables
    assert all(Pattern(2, 4).holds(layer.weight) for layer in prunable_layers(pruned.model, Pattern(2, 4)))


@pytest.mark.usefixtures("untraceable")
def test_a_folder_of_a_model_that_cannot_be_traced_proves_itself(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    settings = PruneConfig(order="random", mode="gather", calibration=str(tiny_text), length=16, samples=24)
    out = tmp_path / "out"
    prune_to_folder(str(tiny_checkpoint), out, settings, evaluation=Evaluation(str(tiny_text), 4, 16))
    assert verify(out).layers == 14


def test_a_layer_that_takes_no_part_stays_dense(tiny_llama: LlamaForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    tiny_llama.model.layers[0].spare = torch.nn.Linear(32, 32)
    before = tiny_llama.model.layers[0].spare.weight.clone()
    pruned = prune(tiny_llama, order="random", examples=WINDOWS, precision="fp32")
    assert "not used in the forward pass, so these stay dense: model.layers.0.spare" in caplog.text
    assert torch.equal(pruned.model.model.layers[0].spare.weight, before) and len(pruned.layers) == 14


@pytest.mark.usefixtures("retraced")
def test_an_op_without_a_rule_keeps_what_it_touches_in_order_and_the_rest_moves(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    activation = tiny_llama.model.layers[0].mlp.act_fn
    monkeypatch.setattr(activation, "forward", lambda x: x.cummax(-1).values)
    prepared = prepare(tiny_llama, None, PruneConfig(precision="fp32"), examples=WINDOWS)
    assert "model.layers.0.mlp.down_proj.input keeps its order: no rule for cummax" in caplog.text
    names = {problem.name for problem in prepared.outline.problems}
    assert "model.layers.1.mlp.down_proj.input" in names and "model.layers.0.mlp.down_proj.input" not in names
    natural = prepared.network.measures()
    solution = Random().solve(prepared.network, prepared.run)
    masked = probe_outputs(tiny_llama, {"input_ids": WINDOWS})
    pruned = Held(prepared, None).finish(solution, natural)
    torch.testing.assert_close(probe_outputs(pruned.model, {"input_ids": WINDOWS}), masked, rtol=0, atol=1e-5)
    assert all(Pattern(2, 4).holds(layer.weight) for layer in prunable_layers(pruned.model, Pattern(2, 4)))


@pytest.mark.parametrize(("total", "measured", "held_out"), [(192, 24, 8), (20, 7, 2), (3, 1, 1)])
def test_examples_are_shared_out(total: int, measured: int, held_out: int) -> None:
    assert PruneConfig().shares(total) == [measured, held_out, total - measured - held_out]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(PermpruneError, match="needs at least 3"):
        PruneConfig().shares(2)


def test_nan_weights_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(PermpruneError, match=r"layers\.1\.mlp\.up_proj holds NaN"):
        prune(tiny_llama, examples=WINDOWS)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "both"},
        {"precision": "int8"},
        {"saliency": "luck"},
        {"pattern": "4:2"},
        {"update": "luck"},
        {"batch": 0},
    ],
)
def test_unknown_settings_are_refused(tiny_llama: LlamaForCausalLM, settings: dict[str, Any]) -> None:
    with pytest.raises(PermpruneError):
        prune(tiny_llama, examples=WINDOWS, **settings)


def test_without_tokenizer_or_examples_there_is_no_calibration(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(PermpruneError, match="as examples"):
        prune(tiny_llama)


def test_gap_closed() -> None:
    assert gap_closed(100.0, 10.0, 1000.0) == pytest.approx(0.5)
    assert gap_closed(1000.0, 10.0, 1000.0) == 0
    assert gap_closed(10.0, 10.0, 10.0) is None
    for metric, dense, none in ((TOP_1_ACCURACY, 0.8, 0.6), (WORD_ERROR_RATE, 0.1, 0.3)):
        assert gap_closed((dense + none) / 2, dense, none, metric=metric) == pytest.approx(0.5)
        assert gap_closed(0.7, none, dense, metric=metric) is None


def test_peak_memory_sees_what_was_allocated() -> None:
    reset_peak_memory()
    before = peak_memory_mb()
    with mmap.mmap(-1, 2**28) as block:  # freed memory of the process is not used again for it
        torch.frombuffer(block, dtype=torch.uint8).fill_(1)
        assert peak_memory_mb() > before + 200


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fold", "gather"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_folder_loads_and_proves_itself(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_text: Path,
    tmp_path: Path,
    mode: str,
    dtype: torch.dtype,
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_llama.to(dtype).save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    settings = PruneConfig(mode=mode, calibration=str(tiny_text), length=16, samples=24)
    prune_to_folder(str(source), out, settings.replace(order="random"), evaluation=Evaluation(str(tiny_text), 4, 16))
    assert verify(out).layers == 14
    model = load(out)
    assert model.dtype == dtype
    plain = out / "model.safetensors"
    if mode == "fold":
        ids = WINDOWS[:2]
        again = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
        assert torch.equal(probe_outputs(again, {"input_ids": ids}), probe_outputs(model, {"input_ids": ids}))
        assert plain.exists() and not read_record(out).gathers
    else:
        assert (out / GATHERED).exists() and not plain.exists()
        with pytest.raises(OSError, match=r"load them with permprune\.load"):
            AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.slow
@pytest.mark.usefixtures("whole_update")
@pytest.mark.parametrize("mode", ["fold", "gather"])
def test_a_folder_of_updated_weights_proves_itself(
    tiny_checkpoint: Path, tiny_llama: LlamaForCausalLM, tiny_text: Path, tmp_path: Path, mode: str
) -> None:
    settings = PruneConfig(mode=mode, update="sparsegpt", calibration=str(tiny_text), length=16, samples=24)
    out, evaluation = tmp_path / "out", Evaluation(str(tiny_text), 4, 16)
    record = prune_to_folder(str(tiny_checkpoint), out, settings.replace(order="random"), evaluation=evaluation)
    measured = record.measured
    assert measured
    assert verify(out).layers == 14
    assert record.settings["update"] == "sparsegpt" and record.curve[-1].stage == "update"
    assert evaluate(str(out), evaluation).value == pytest.approx(measured.pruned, rel=1e-5)
    compared = compare(str(tiny_checkpoint), ["random"], settings, evaluation=evaluation)
    assert compared.dense.result.value == pytest.approx(measured.dense, rel=1e-5)
    assert compared.rows[1].result.value == pytest.approx(measured.pruned, rel=1e-5)
    before = tiny_llama.model.layers[0].mlp.down_proj.weight
    kept = load(out).model.layers[0].mlp.down_proj.weight
    assert torch.isin(kept[kept != 0], before).float().mean() < 0.2  # updated, not only reordered


def test_a_folder_whose_weights_were_touched_fails_verification(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    settings = PruneConfig(order="random", calibration=str(tiny_text), length=16, samples=24)
    out = tmp_path / "out"
    prune_to_folder(str(tiny_checkpoint), out, settings, evaluation=Evaluation(str(tiny_text), 4, 16))
    model = load(out)
    coupling = discover(model, {"input_ids": WINDOWS[:2]})
    moved = next(space for space in coupling.spaces if "down_proj" in space.name)
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data[:, [0, 5]] = weight.data[:, [5, 0]]
    model.save_pretrained(out)
    with pytest.raises(PermpruneError, match=r"layers.0.mlp.down_proj.weight is not as permprune wrote it"):
        verify(out)
    assert moved.size == 64


@pytest.fixture(scope="module")
def blocks(smollm: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 8 of the 30 blocks of SmolLM2-135M between its embedding and its head."""
    whole, tokenizer = smollm
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers = 8
    config.layer_types = None
    model = LlamaForCausalLM(config).to(whole.dtype)
    model.load_state_dict({name: whole.get_parameter(name) for name in model.state_dict()})
    folder = tmp_path_factory.mktemp("blocks")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def coupling(blocks: Path, smollm: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> Coupling:
    """What is coupled in these blocks, which takes seconds to trace."""
    ids = tokenize(load_documents(None, "evaluation"), smollm[1], 16, 2)
    return discover(LlamaForCausalLM.from_pretrained(blocks), {"input_ids": ids})


def test_blocks_of_the_real_model_fold_load_and_verify(
    blocks: Path,
    smollm: tuple[LlamaForCausalLM, PreTrainedTokenizerFast],
    coupling: Coupling,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A random order in every space: plain loading gives the masked model's logits, exactly 2:4."""
    monkeypatch.setattr("permprune.plan.discover", lambda *_: coupling)
    out = tmp_path / "out"
    settings = PruneConfig(order="random", samples=6, length=64, measured=3, held_out=1)
    prune_to_folder(str(blocks), out, settings, evaluation=Evaluation(None, 2, 64))
    loaded = load(out)
    found = verify(loaded)
    assert found.layers == 56 and found.difference < 1e-3
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    _, tokenizer = smollm
    ids = tokenize(load_documents(None, "evaluation"), tokenizer, 32, 2)
    assert torch.equal(probe_outputs(model, {"input_ids": ids}), probe_outputs(loaded, {"input_ids": ids}))
    for layer in prunable_layers(model, Pattern(2, 4)):
        assert Pattern(2, 4).holds(layer.weight)


def test_dense_folding_of_blocks_of_the_real_model_changes_nothing(
    blocks: Path, smollm: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], coupling: Coupling
) -> None:
    """A few spaces alone, then every discovered space at once: logits within 1e-4."""
    model = LlamaForCausalLM.from_pretrained(blocks).eval()
    ids = tokenize(load_documents(None, "evaluation"), smollm[1], 16, 2)
    spaces = coupling.spaces
    for end in (".down_proj.input", ".o_proj.input"):
        assert sum(space.name.endswith(end) for space in spaces) == 8
    for space in [space for space in spaces if ".7." in space.name or space.name.endswith("residual")]:
        assert verify_space(model, space, {"input_ids": ids}) < 1e-4
    before, generator = probe_outputs(model, {"input_ids": ids}), torch.Generator().manual_seed(0)
    for space in spaces:
        table = torch.stack([torch.randperm(space.size, generator=generator) for _ in range(space.blocks)])
        fold(model, space, table)
    after = probe_outputs(model, {"input_ids": ids})
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
