"""Blocks that run again in the backward pass against blocks that run once."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from permprune.calibration.statistics import Statistics, calibrate
from permprune.examples import Examples
from permprune.losses.objective import Objective
from permprune.losses.targets import Predictions, Task, next_token
from permprune.models.activation_checkpointing import recomputed, recomputing
from permprune.models.layers import Layer, blocks, prunable_layers
from permprune.models.narrow_weights import NarrowWeights
from permprune.pattern import Pattern
from permprune.pruning.gradients import Gradients
from permprune.pruning.network import PrunedNetwork
from permprune.pruning.problem import Outline
from permprune.saliency.metrics import Wanda

from ..fixtures import make_tiny_llama

WINDOWS = torch.randint(128, (5, 12), generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Returns a tuple, takes a keyword, shares a linear with the other blocks, and drops out in training mode."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.own, self.shared, self.dropout = nn.Linear(32, 32), shared, nn.Dropout(0.5)

    def forward(self, x: Tensor, *, gain: Tensor) -> tuple[Tensor, None]:
        return x + gain * self.dropout(self.shared(torch.tanh(self.own(x)))), None


class Sharing(nn.Module):
    """Predicts the next token; the last block runs twice, and the linear that all share once more outside of them."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(32, 32)
        self.embedding, self.head = nn.Embedding(128, 32), nn.Linear(32, 128)
        self.blocks = nn.ModuleList([Block(shared) for _ in range(3)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in [*self.blocks, self.blocks[-1]]:
            x, _ = block(x, gain=torch.tensor(0.5))
        said: Tensor = self.head(x + self.blocks[0].shared(x))
        return said


def next_of_sharing(model: nn.Module, batch: Examples) -> Predictions:
    ids = batch["input_ids"]
    return Predictions(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": make_tiny_llama,
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=32, n_embd=32, n_layer=2, n_head=4)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4)),
    "sharing": Sharing,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[request.param]().train()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


def last_answer(task: Task) -> Task:
    """The task of the last token of each window alone."""
    each = WINDOWS.shape[1] - 1

    def ask(model: nn.Module, batch: Examples) -> Predictions:
        said = task(model, batch)
        assert isinstance(said, Predictions) and said.labels is not None
        return Predictions(said.logits[each - 1 :: each], said.labels[each - 1 :: each])

    return ask


def parts(model: nn.Module, one_label_per_example: bool = False) -> tuple[list[Layer], dict[str, str], Task]:
    layers = prunable_layers(model, Pattern(2, 4))
    task = next_of_sharing if isinstance(model, Sharing) else next_token
    return layers, {layer.name: layer.name for layer in layers}, last_answer(task) if one_label_per_example else task


def statistics(
    model: nn.Module,
    dtype: torch.dtype,
    recompute: bool,
    memory: int | None = None,
    one_label_per_example: bool = False,
) -> Statistics:
    layers, sites, task = parts(model, one_label_per_example)
    return calibrate(
        model, layers, sites, Examples.of(WINDOWS), task, dtype=dtype, batch=2, memory=memory, recompute=recompute
    )


def gradients(model: nn.Module, found: Statistics, dtype: torch.dtype, recompute: bool) -> Gradients:
    (layers, sites, task), pattern = parts(model, found.one_label_per_example), Pattern(2, 4)
    network = PrunedNetwork(
        model,
        Outline(pattern, layers, sites, []),
        statistics=found,
        saliency=Wanda(),
        patterns=dict.fromkeys(sites, pattern),
        task=task,
        dtype=dtype,
        batch=2,
        recompute=recompute,
        held=NarrowWeights.of(model, layers, dtype),
    )
    every = Objective(1.0, 1.0, 1.0, 1.0)
    try:
        return network.gradients(Examples.of(WINDOWS), every)
    finally:
        network.restore()


@pytest.fixture
def runs(model: nn.Module) -> Iterator[list[bool]]:
    """Of every run of the blocks' linears, whether it was one of a block that ran again."""
    found: list[bool] = []
    handles = [
        layer.module.register_forward_hook(lambda *_: found.append(recomputing()))
        for layer in prunable_layers(model, Pattern(2, 4))
    ]
    yield found
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("memory", "one_label_per_example"), [(None, False), (1, False), (None, True)])
def test_calibration_finds_the_same_statistics(
    model: nn.Module, dtype: torch.dtype, runs: list[bool], memory: int | None, one_label_per_example: bool
) -> None:
    once = statistics(model, dtype, False, memory, one_label_per_example)
    assert once.one_label_per_example == one_label_per_example
    assert runs and not any(runs)
    runs.clear()
    again = statistics(model, dtype, True, memory, one_label_per_example)
    assert any(runs)
    for name, moments in once.moments.items():
        torch.testing.assert_close(again.moments[name], moments, rtol=1e-6, atol=0)
        torch.testing.assert_close(again.fisher[name], once.fisher[name], rtol=1e-6, atol=0)
        assert moments.any() and once.fisher[name].any()
    assert again.terms == once.terms


@pytest.mark.parametrize("one_label_per_example", [False, True])
def test_gradients_are_the_same(
    model: nn.Module, dtype: torch.dtype, runs: list[bool], one_label_per_example: bool
) -> None:
    found = statistics(model, dtype, False, one_label_per_example=one_label_per_example)
    runs.clear()
    once = gradients(model, found, dtype, False)
    assert runs and not any(runs)
    runs.clear()
    again = gradients(model, found, dtype, True)
    assert any(runs)
    assert again.loss == pytest.approx(once.loss, rel=1e-7) and again.count == once.count
    for name, slope in once.weight.items():
        torch.testing.assert_close(again.weight[name], slope, rtol=1e-6, atol=0)
        torch.testing.assert_close(again.fisher[name], once.fisher[name], rtol=1e-6, atol=0)
        assert slope.any() and once.fisher[name].any()


def test_blocks_keep_their_inputs_alone_until_they_run_again(tiny_llama: LlamaForCausalLM) -> None:
    """Storages that the graph of the blocks holds between forward and backward pass."""

    def kept(active: bool) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with recomputed(tiny_llama.model, active), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            tiny_llama.model(WINDOWS).last_hidden_state.sum().backward()
        return sum(sizes.values())

    tiny_llama.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    assert 4 * kept(True) < kept(False)


def test_leaves_the_blocks_as_they_were(tiny_llama: LlamaForCausalLM) -> None:
    first, second = blocks(tiny_llama)
    replaced = second.forward = torch.nn.Identity().forward  # as libraries do that move weights between devices
    with pytest.raises(KeyError), recomputed(tiny_llama):
        assert "forward" in vars(first) and second.forward is not replaced
        raise KeyError
    assert "forward" not in vars(first) and second.forward is replaced
    with recomputed(tiny_llama, False):
        assert "forward" not in vars(first) and second.forward is replaced
