"""Weights that stay on disk."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from permprune.checkpoints.offload import attach, load_at_rest, read_offloaded, read_skeleton, write_offloaded
from permprune.checkpoints.origin import Origin, origin_of, set_origin
from permprune.checkpoints.probe import make_probe, probe_outputs
from permprune.checkpoints.record import read_record
from permprune.checkpoints.weights import GATHERED
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.losses.cross_entropy import Projected, compute_logits
from permprune.pruning.folder import save

from ..records import record_of

IDS = torch.arange(32).view(2, 16)


def test_the_skeleton_is_the_model_without_weights(tiny_checkpoint: Path, tiny_llama: LlamaForCausalLM) -> None:
    skeleton = read_skeleton(str(tiny_checkpoint))
    shapes = {name: p.shape for name, p in tiny_llama.named_parameters()}
    assert {name: p.shape for name, p in skeleton.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    (tiny_checkpoint / "config.json").write_text("{}")
    with pytest.raises(PermpruneError, match="does not load"):
        read_skeleton(str(tiny_checkpoint))


def test_a_model_runs_on_weights_that_come_and_go(
    tiny_checkpoint: Path, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    model, _, dtype, weights = read_offloaded(str(tiny_checkpoint), tmp_path / "offloaded")
    attach(model, weights)
    assert dtype == torch.float32
    for _ in range(2):
        assert torch.equal(probe_outputs(model, {"input_ids": IDS}), probe_outputs(tiny_llama, {"input_ids": IDS}))
        assert all(parameter.is_meta for parameter in model.parameters())
    weights.edit = lambda name, tensor: tensor / 2 if name == "model.embed_tokens.weight" else tensor
    changed = probe_outputs(model, {"input_ids": IDS})
    tiny_llama.model.embed_tokens.weight.data /= 2  # the head's weight as well: they are tied
    assert torch.equal(changed, probe_outputs(tiny_llama, {"input_ids": IDS}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gathered", [False, True])
def test_what_is_written_is_what_was_read_as_edited(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    dtype: torch.dtype,
    gathered: bool,
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_llama.to(dtype).save_pretrained(source, max_shard_size="40KB")
    tiny_tokenizer.save_pretrained(source)
    model, tokenizer, stored, weights = read_offloaded(str(source), tmp_path / "offloaded")
    attach(model, weights)
    probe_outputs(model, {"input_ids": IDS})  # takes tied weights apart
    weights.edit = lambda name, tensor: -tensor if name.endswith("up_proj.weight") else tensor
    out.mkdir()
    write_offloaded(model, tokenizer, weights, dtype=stored, gathered=gathered, folder=out, memory=40_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1 or (gathered and files == [out / GATHERED])
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = {name: p.detach() for name, p in tiny_llama.named_parameters()}  # the tied one once
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, -expected[name] if name.endswith("up_proj.weight") else expected[name])
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {path.name for path in out.iterdir()}


def test_how_a_model_was_pruned_is_read_with_it(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    record = record_of(base_model="someone/dense", reordered={"last_hidden_state": ["residual"]})
    set_origin(tiny_llama, Origin("model", torch.float32, record, make_probe(tiny_llama, {"input_ids": IDS})))
    save(tiny_llama, tmp_path / "pruned")
    model = read_offloaded(str(tmp_path / "pruned"), tmp_path / "offloaded")[0]
    assert origin_of(model).record == read_record(tmp_path / "pruned")


def test_without_safetensors_there_is_nothing_to_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tiny_checkpoint / "model.safetensors").unlink()
    with pytest.raises(PermpruneError, match="does not load"):
        read_offloaded(str(tiny_checkpoint), tmp_path / "offloaded")


def test_logits_of_an_offloaded_model_are_projected(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Whole logits of a large vocabulary would take more memory than all else."""
    model, _, _, weights = read_offloaded(str(tiny_checkpoint), tmp_path / "offloaded")
    assert not any("forward" in vars(module) for module in model.modules())
    load_at_rest(model, weights, (), held=False)
    batch = Examples.of(torch.arange(16).view(2, 8))
    with torch.no_grad():
        given, logits = compute_logits(model, batch), model(**batch).logits
    assert isinstance(given, Projected)
    torch.testing.assert_close(given.whole(), logits)
