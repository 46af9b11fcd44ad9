"""The updates by name, and what they do to a network."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from permprune.config import PruneConfig
from permprune.engine.held import Prepared, prepare
from permprune.errors import PermpruneError
from permprune.pattern import Pattern
from permprune.permuters.base import Random
from permprune.pruning.network import PrunedNetwork
from permprune.updates.base import LayerUpdate
from permprune.updates.methods import ADMM, UPDATES, NoUpdate, SparseGPT, update

WINDOWS = torch.randint(128, (12, 16), generator=torch.Generator().manual_seed(0))


def ready(model: LlamaForCausalLM | GPT2LMHeadModel, **settings: str) -> Prepared:
    prepared = prepare(model, None, PruneConfig(**{"precision": "fp32", **settings}), examples=WINDOWS)
    Random().solve(prepared.network, prepared.run)
    return prepared


def weights(network: PrunedNetwork) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in network.shown.items()}


@contextmanager
def inputs_of(network: PrunedNetwork) -> Iterator[dict[str, Tensor]]:
    read: dict[str, Tensor] = {}
    handles = [
        layer.module.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0].flatten(0, 1)}))
        for name, layer in network.layers.items()
    ]
    yield read
    for handle in handles:
        handle.remove()


def test_no_update_leaves_masks_alone(tiny_llama: LlamaForCausalLM) -> None:
    prepared = ready(tiny_llama)
    NoUpdate().run(prepared.network, prepared.measured)
    for name, weight in weights(prepared.network).items():
        assert torch.equal(weight, prepared.network.dense[name] * prepared.network.masks[name])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fold", "gather"])
def test_each_block_is_updated_for_the_inputs_that_the_updated_blocks_before_it_give(
    tiny_llama: LlamaForCausalLM, mode: str
) -> None:
    prepared = ready(tiny_llama, mode=mode)
    network, method = prepared.network, SparseGPT()
    method.run(network, prepared.measured)
    found, columns = weights(network), network.stored_columns()
    for index in range(2):
        own = [name for name in found if name.startswith(f"model.layers.{index}.")]
        network.show({name: network.dense[name] for name in own})
        with inputs_of(network) as read, torch.no_grad():
            tiny_llama(**prepared.measured)
        for name in own:
            moments = read[name].T @ read[name] / len(read[name])
            expected = method.apply(network.dense[name], moments, columns[name], network.patterns[name])
            torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-5)
        network.show({name: found[name] for name in own})


@pytest.mark.parametrize(("precision", "method"), [("fp32", SparseGPT()), ("bf16", SparseGPT()), ("bf16", ADMM())])
def test_holds_the_pattern_in_stored_order_and_leaves_no_hooks(
    tiny_llama: LlamaForCausalLM, precision: str, method: LayerUpdate
) -> None:
    prepared = ready(tiny_llama, precision=precision, pattern="1:4")
    network = prepared.network
    method.run(network, prepared.measured)
    columns = network.stored_columns()
    for name, weight in weights(network).items():
        assert network.patterns[name].holds(weight[:, columns[name]])
        assert not torch.equal(weight, network.dense[name] * network.masks[name])
    network.restore()
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())


def test_layers_are_updated_in_fp32_whatever_the_activations(tiny_llama: LlamaForCausalLM) -> None:
    class Probe(LayerUpdate):
        name = "probe"

        def apply(self, weight: Tensor, moments: Tensor, order: Tensor, pattern: Pattern) -> Tensor:
            product = weight @ moments
            assert weight.dtype == moments.dtype == product.dtype == torch.float32
            return weight * 0

    prepared = ready(tiny_llama, precision="bf16")
    Probe().run(prepared.network, prepared.measured)
    assert not any(weight.any() for weight in weights(prepared.network).values())


@pytest.mark.parametrize("method", [SparseGPT(), ADMM()])
def test_weights_stored_transposed_are_updated_too(method: LayerUpdate) -> None:
    config = GPT2Config(vocab_size=128, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
    prepared = ready(model)
    network = prepared.network
    before = network.measures()
    method.run(network, prepared.measured)
    columns = network.stored_columns()
    assert all(layer.transposed for layer in network.layers.values())
    assert all(network.patterns[name].holds(weight[:, columns[name]]) for name, weight in weights(network).items())
    assert sum(row.error for row in network.measures()) < sum(row.error for row in before)


def test_excluded_layers_and_blocks_stay_dense(tiny_llama: LlamaForCausalLM) -> None:
    dense = {name: parameter.clone() for name, parameter in tiny_llama.named_parameters()}
    settings = PruneConfig(precision="fp32", exclude=("*.0.*", "*.1.mlp.down_proj"))
    prepared = prepare(tiny_llama, None, settings, examples=WINDOWS)
    SparseGPT().run(prepared.network, prepared.measured)
    prepared.network.write()
    changed = {name for name, parameter in tiny_llama.named_parameters() if not torch.equal(parameter, dense[name])}
    assert changed == {layer.parameter for layer in prepared.outline.layers} and len(changed) == 6


def test_a_layer_without_an_update_is_named(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = ready(tiny_llama)

    def fail(*_: object) -> Tensor:
        raise PermpruneError("no factor")

    monkeypatch.setattr(SparseGPT, "apply", fail)
    with pytest.raises(PermpruneError, match=r"model\.layers\.0\.self_attn\.q_proj: no factor"):
        SparseGPT().run(prepared.network, prepared.measured)
    with prepared.network.dense_weights():
        assert not any(module._forward_pre_hooks for module in tiny_llama.modules())
    prepared.network.set_orders({})
    for name, weight in weights(prepared.network).items():
        assert torch.equal(weight, prepared.network.dense[name] * prepared.network.masks[name])


def test_looks_up_by_name_and_passes_objects_through() -> None:
    assert [type(update(name)) for name in UPDATES] == [NoUpdate, SparseGPT, ADMM]
    method = SparseGPT(damping=0.1)
    assert update(method) is method


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(PermpruneError, match='unknown update "gptq": choose one of none, sparsegpt, admm'):
        update("gptq")
