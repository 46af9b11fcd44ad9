"""Models whose rows processes divide compute what whole models compute, with a part of the weights in each."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import permprune
from permprune.calibration.symmetric import Symmetric
from permprune.config import PruneConfig
from permprune.engine.held import measure
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.losses.objective import Objective
from permprune.models.layers import block_linears, prunable_layers
from permprune.models.row_shards import load_rows, require_divisible
from permprune.permuters import kept
from permprune.permuters.kept import RIAPermuter
from permprune.permuters.trust_region import Newton
from permprune.plan import Plan, plan_run
from permprune.system import distributed

from ..processes import in_processes


def divided(whole: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy of a model with the rows of this process."""
    model = copy.deepcopy(whole).to("meta")  # type: ignore[arg-type]
    model.tie_weights()
    for name, buffer in whole.named_buffers():
        model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer, persistent=False)
    load_rows(model, lambda name, rows: whole.get_parameter(name).data[rows].clone())
    return model


def of_model(plan: Plan, model: LlamaForCausalLM) -> Plan:
    """A plan with the layers of a copy of its model."""
    layers = prunable_layers(model, plan.outline.pattern)
    return dataclasses.replace(plan, outline=dataclasses.replace(plan.outline, layers=layers))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_outputs_and_gradients_are_those_of_the_whole_model(
    tiny_llama: LlamaForCausalLM, ids: Tensor, count: int, tied: bool
) -> None:
    """With three processes no number of rows can be divided evenly."""
    if not tied:
        tiny_llama.config.tie_word_embeddings = False
        tiny_llama.lm_head.weight = torch.nn.Parameter(torch.randn(128, 32) / 50)
    names = [layer.parameter for layer in block_linears(tiny_llama)]

    def differentiated(model: LlamaForCausalLM) -> tuple[Tensor, dict[str, Tensor]]:
        for name in names:
            model.get_parameter(name).requires_grad_(True)
        logits = model(ids, use_cache=False).logits
        logits.square().mean().backward()
        return logits.detach(), {name: model.get_parameter(name).grad for name in names}

    def run() -> tuple[Tensor, dict[str, Tensor], int]:
        model = divided(tiny_llama)
        return *differentiated(model), sum(parameter.numel() for parameter in model.parameters())

    with distributed.dividing_rows():
        found = in_processes(count, run)
    logits, gradients = differentiated(tiny_llama)
    for own_logits, _, size in found:
        torch.testing.assert_close(own_logits, logits)
        assert torch.equal(own_logits, found[0][0])
        assert size < sum(parameter.numel() for parameter in tiny_llama.parameters()) / count * 1.1
    for name, gradient in gradients.items():
        torch.testing.assert_close(torch.cat([rows[name] for _, rows, _ in found]), gradient, rtol=1e-5, atol=1e-6)


def test_a_weight_that_another_module_reads_is_whole_and_so_is_the_bias_beside_it() -> None:
    class Scaled(torch.nn.Embedding):
        pass

    whole = torch.nn.Sequential(Scaled(6, 4), torch.nn.Linear(4, 6))
    whole[1].weight = whole[0].weight
    ids = torch.arange(6)[None]

    def run() -> tuple[Tensor, int]:
        model = copy.deepcopy(whole).to("meta")
        model[1].weight = model[0].weight
        load_rows(model, lambda name, rows: whole.get_parameter(name).data[rows].clone())
        return model(ids), sum(parameter.numel() for parameter in model.parameters())

    with distributed.dividing_rows():
        for outputs, size in in_processes(2, run):
            assert torch.equal(outputs, whole(ids)) and size == 6 * 4 + 6


def test_a_divided_matrix_is_the_whole_one() -> None:
    rows = torch.randn(40, 700)

    channels = torch.randperm(700)[:300]

    def run() -> tuple[list[Tensor], int]:
        matrix = Symmetric.zeros(700, rows.device)
        matrix.add_products(rows)
        narrow = matrix.correlations()
        read = [read for own in (matrix, narrow) for read in (own.dense(), own.block(channels), own.main_diagonal())]
        return read, narrow.nbytes

    whole, size = run()
    with distributed.dividing_rows():
        found = in_processes(2, run)
    for read, own_size in found:
        assert all(map(torch.equal, read, whole))
        assert own_size < 0.6 * size


def test_orders_are_those_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The channels inside the MLP are more than channels that swap, or are assigned, with each other."""
    monkeypatch.setattr(kept, "PART", 192)
    torch.manual_seed(0)
    model_config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    whole = LlamaForCausalLM(model_config).eval()
    tokens = torch.randint(0, 128, (12, 8), generator=torch.Generator().manual_seed(0))
    config = PruneConfig(length=8, measured=4, held_out=4, precision="fp32", saliency="ria")
    plan = plan_run(whole, config, examples=Examples.of(tokens), weights=whole.state_dict())
    before = copy.deepcopy(whole)

    def run() -> list[Any]:
        """The orders that are found, the losses, the measures of the layers, and slopes."""
        model = divided(before) if distributed.shards() > 1 else whole
        own = of_model(plan, model)
        own.run = dataclasses.replace(plan.run, solved={})
        network = measure(own, model, 0.0).network
        assigned = RIAPermuter().solve(network, own.run)
        solution = Newton(start=RIAPermuter(), rounds=1, swaps=1, examples=2).solve(network, own.run)
        errors = torch.tensor([(layer.kept, layer.error) for layer in network.measures()])
        slopes = network.slopes(own.run.batch(0, 2), Objective(), network.identity(), solution.orders)
        losses = [point.loss for point in solution.curve]
        return [assigned.orders, solution.orders, torch.tensor(losses), errors, torch.tensor([*slopes.values()])]

    alone = run()
    with distributed.dividing_rows():
        both = in_processes(2, run)
    for found in both:
        for own, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)


def test_divided_rows_follow_bf16_up_to_the_sums_of_gradients() -> None:
    """Losses are those of one process; gradients differ less than a fifth of what bf16 changes in them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4}
    whole = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, initializer_range=0.2, **sizes)).eval()
    tokens = torch.randint(0, 128, (24, 16), generator=torch.Generator().manual_seed(0))

    def measured(precision: str, processes: int) -> tuple[list[float], Tensor]:
        """The held-out losses of the dense and of the masked model, and all gradients."""
        config = PruneConfig(length=16, measured=8, held_out=4, precision=precision)
        plan = plan_run(copy.deepcopy(whole), config, examples=Examples.of(tokens), weights=whole.state_dict())

        def run() -> tuple[list[float], dict[str, Tensor]]:
            model = divided(whole) if distributed.shards() > 1 else copy.deepcopy(whole)
            network = measure(of_model(plan, model), model, 0.0).network
            with network.dense_weights():
                losses = [network.loss(plan.run.held_out, Objective())]
            losses.append(network.loss(plan.run.held_out, Objective()))
            batch = plan.run.batch(0, 4)
            return losses, {
                name: gradient.float() for name, gradient in network.gradients(batch, Objective()).weight.items()
            }

        if processes == 1:
            results = [run()]
        else:
            with distributed.dividing_rows():
                results = in_processes(processes, run)
        gradients = [torch.cat([rows[name] for _, rows in results]).flatten() for name in results[0][1]]
        return results[0][0], torch.cat(gradients)

    (wide, exact), (narrow, alone) = measured("fp32", 1), measured("bf16", 1)
    assert all(abs(a - b) > 1e-4 for a, b in zip(wide, narrow, strict=True))
    error = (alone - exact).norm()
    for processes in (2, 3):
        losses, gradient = measured("bf16", processes)
        assert losses == narrow
        assert (gradient - alone).norm() < min(0.2 * error, 0.02 * alone.norm())


def test_layers_whose_rows_cannot_be_divided_are_refused() -> None:
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_attention_heads=4, num_key_value_heads=1
    )
    layers = block_linears(LlamaForCausalLM(config))
    require_divisible(layers, 2)
    with pytest.raises(PermpruneError, match=r"k_proj has 2 rows for 3 processes: use fewer"):
        require_divisible(layers, 3)
    with pytest.raises(PermpruneError, match="leave shard out"):
        permprune.prune(LlamaForCausalLM(config), shard=True)
