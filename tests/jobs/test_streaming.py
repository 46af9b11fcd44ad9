"""Models read layer by layer: what they become, and what they take."""

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from permprune.checkpoints.io import load
from permprune.checkpoints.record import read_record
from permprune.checkpoints.weights import GATHERED
from permprune.config import PruneConfig
from permprune.engine.measuring import Evaluation
from permprune.engine.streamed import require_streamable
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.forecasts.fitting import fit_memory
from permprune.jobs.prune import prune_to_folder
from permprune.jobs.verify import verify
from permprune.permuters.registry import PERMUTERS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchanged_settings")]

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 7, "num_attention_heads": 4}
LIMIT = 2**20
"""Less than the 1.2 MB of the deep model's weights in fp32."""


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that operations inside make and that live: `peak` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._drop, storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
        return result

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@pytest.fixture
def deep(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A checkpoint of many layers, in bf16, whose attention has biases and whose embedding is tied."""
    config = LlamaConfig(vocab_size=128, attention_bias=True, tie_word_embeddings=True, **SIZES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        model.to(torch.bfloat16).save_pretrained(tmp_path / "deep", max_shard_size="200KB")
    tiny_tokenizer.save_pretrained(tmp_path / "deep")
    return tmp_path / "deep"


def run(source: Path, out: Path, method: str, text: Path, **settings: Any) -> dict[str, Any]:
    """Few enough windows that the statistics come of one batch, held or streamed."""
    chosen = PruneConfig(
        permute=method,
        calibration=str(text),
        length=16,
        samples=24,
        measured=4,
        batch=4,
        held_out=2,
        precision="fp32",
        **settings,
    )
    return prune_to_folder(str(source), out, chosen, evaluation=Evaluation(str(text), 4, 16)).to_json()


@pytest.mark.parametrize(
    ("method", "saliency"),
    [("none", "wanda"), ("random", "magnitude"), ("ria", "ria"), ("cp:escapes=1", "wanda"), ("ria", "obs")],
)
def test_a_gathered_model_is_the_same_held_or_streamed(
    deep: Path, tiny_text: Path, tmp_path: Path, method: str, saliency: str
) -> None:
    settings = {"mode": "gather", "saliency": saliency}
    held = run(deep, tmp_path / "held", method, tiny_text, **settings)
    streamed = run(deep, tmp_path / "streamed", method, tiny_text, **settings, memory=5 * LIMIT // 4)
    for key in ("permutations", "gathers", "layers"):
        assert streamed[key] == held[key]
    assert "layer by layer" in streamed["showcase"]["note"]
    for key in ("dense", "none", "pruned"):
        assert streamed["measured"][key] == pytest.approx(held["measured"][key], rel=1e-5)
    assert verify(tmp_path / "streamed").layers == 49
    assert (tmp_path / "streamed" / GATHERED).exists() == (method != "none")
    one, other = (load(tmp_path / name) for name in ("held", "streamed"))
    assert one.dtype == other.dtype == torch.bfloat16
    assert other.state_dict().keys() == one.state_dict().keys()
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in one.state_dict().items())


def test_a_folded_model_has_the_orders_of_a_held_one_but_for_the_residual(
    deep: Path, tiny_text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = run(deep, tmp_path / "held", "ria", tiny_text)
    streamed = run(deep, tmp_path / "streamed", "ria", tiny_text, memory=LIMIT)
    assert "model.residual keeps its natural order" in caplog.text
    assert streamed["permutations"].keys() == held["permutations"].keys() - {"model.residual"}
    assert all(held["permutations"][space] == table for space, table in streamed["permutations"].items())
    assert verify(tmp_path / "streamed").layers == 49
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", dtype="auto")
    dense = AutoModelForCausalLM.from_pretrained(deep, dtype="auto")
    assert torch.equal(plain.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    order = torch.tensor(streamed["permutations"]["model.layers.3.mlp.down_proj.input"][0])
    up, kept = (model.model.layers[3].mlp.up_proj.weight for model in (dense, plain))
    assert torch.equal(kept, up[order] * kept.ne(0)) and kept.ne(0).float().mean() == 0.5


def test_layers_stored_transposed_and_left_out_stream_too(
    tiny_text: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=3, n_head=4)).save_pretrained(
            tmp_path / "source"
        )
    tiny_tokenizer.save_pretrained(tmp_path / "source")
    for mode in ("fold", "gather"):
        held, streamed = (
            run(
                tmp_path / "source",
                tmp_path / f"{mode}-{memory}",
                "ria",
                tiny_text,
                mode=mode,
                memory=memory,
                exclude=("*.1.mlp.c_fc",),
            )
            for memory in (None, 600_000)
        )
        assert {row["name"] for row in streamed["layers"]} == {row["name"] for row in held["layers"]}
        assert len(streamed["layers"]) == 11 and streamed["gathers"] == held["gathers"]
        assert verify(tmp_path / f"{mode}-600000").layers == 11


@pytest.mark.parametrize("mode", ["fold", "gather"])
def test_a_streamed_run_holds_the_limit_that_a_held_one_breaks(
    deep: Path, tiny_text: Path, tmp_path: Path, mode: str
) -> None:
    peaks = []
    for memory in (None, LIMIT):
        with Held() as held:
            run(deep, tmp_path / str(memory), "ria", tiny_text, mode=mode, memory=memory)
        peaks.append(held.peak)
    assert peaks[1] < LIMIT < sum(4 * p.numel() for p in load(tmp_path / "None").parameters()) < peaks[0]


@pytest.mark.parametrize("method", [name for name in PERMUTERS if name not in ("none", "random", "ria", "cp")])
def test_methods_that_need_the_whole_network_are_refused(tiny_checkpoint: Path, method: str) -> None:
    settings, local = PruneConfig(memory=2**10), "reconstruction"
    if method == local:
        with pytest.raises(PermpruneError, match="even layer by layer"):
            fit_memory(str(tiny_checkpoint), settings.replace(permute=method))
        return
    with pytest.raises(
        PermpruneError, match=r"network in memory, which takes about .* GiB.*none, random, ria, cp, recons"
    ):
        fit_memory(str(tiny_checkpoint), settings.replace(permute=method))


def test_an_update_is_refused_and_a_limit_below_one_layer(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    with pytest.raises(PermpruneError, match="update sparsegpt needs the whole network in memory"):
        run(tiny_checkpoint, tmp_path / "out", "ria", tiny_text, memory=2**10, update="sparsegpt")
    with pytest.raises(PermpruneError, match="even layer by layer this model takes about"):
        run(tiny_checkpoint, tmp_path / "out", "ria", tiny_text, memory=2**10)


def test_a_model_that_fits_is_held(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    settings = PruneConfig(length=16, memory=2**30)
    found = fit_memory(str(tiny_checkpoint), held := settings.replace(permute="ria"))
    assert found is not None and found.config == held and not found.streamed
    assert fit_memory("no such model", PruneConfig()) is None
    run(tiny_checkpoint, tmp_path / "out", "random", tiny_text, memory=2**30)
    assert "model.residual" in read_record(tmp_path / "out").permutations


def test_reconstruction_streams_with_rows_that_weigh_alike(deep: Path, tiny_text: Path, tmp_path: Path) -> None:
    record = run(deep, tmp_path / "out", "reconstruction", tiny_text, mode="gather", memory=2 * LIMIT)
    assert verify(tmp_path / "out").layers == 49
    assert sum(row["error"] for row in record["layers"]) < 0.95 * sum(row["error_none"] for row in record["layers"])


def test_damaged_weights_are_refused(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_text: Path
) -> None:
    tiny_llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    tiny_llama.save_pretrained(tmp_path / "source")
    tiny_tokenizer.save_pretrained(tmp_path / "source")
    with pytest.raises(PermpruneError, match="not finite: the weights or activations overflow"):
        run(tmp_path / "source", tmp_path / "out", "ria", tiny_text, memory=500_000)


def test_images_need_the_model_in_memory(tiny_llama: LlamaForCausalLM) -> None:
    shown = Examples({"input_ids": torch.ones(1, 4), "pixel_values": torch.ones(1, 3, 4, 4)})
    plan: Any = SimpleNamespace(measured=shown)
    with pytest.raises(PermpruneError, match="images only calibrate a model in memory: raise --memory"):
        require_streamable(tiny_llama, plan)
