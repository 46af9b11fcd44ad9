"""The masked model, its losses and its gradients."""

import copy
import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM

from permprune.calibration.statistics import Statistics
from permprune.checkpoints.origin import Origin, set_origin
from permprune.config import PruneConfig
from permprune.engine.held import Prepared, prepare
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.losses.objective import Objective
from permprune.losses.targets import next_token
from permprune.models.layers import prunable_layers
from permprune.pattern import Pattern
from permprune.permuters.base import Random
from permprune.pruning.masked import MaskedLayers
from permprune.saliency.metrics import OBS

from ..fixtures import make_tiny_llama
from ..processes import in_processes

WINDOWS = Examples.of(torch.randint(128, (12, 16), generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def prepared(tiny_llama: LlamaForCausalLM) -> Prepared:
    return prepare(tiny_llama, None, PruneConfig(precision="fp32", measured=4, held_out=2), examples=WINDOWS)


@pytest.mark.parametrize(("count", "tolerance"), [(4, 0.0), (len(WINDOWS), 1e-5)], ids=["few rows", "many rows"])
def test_the_model_runs_with_masked_weights_and_keeps_the_dense_ones(
    tiny_llama: LlamaForCausalLM, prepared: Prepared, count: int, tolerance: float
) -> None:
    network, windows = prepared.network, WINDOWS["input_ids"][:count]
    dense = make_tiny_llama()
    masked = copy.deepcopy(dense)
    for layer in prunable_layers(masked, Pattern(2, 4)):
        layer.weight.mul_(network.masks[layer.name])

    def said(model: LlamaForCausalLM) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(windows).logits
        return logits

    torch.testing.assert_close(said(tiny_llama), said(masked), rtol=tolerance, atol=tolerance)
    with network.dense_weights():
        with network.dense_weights():  # as the dense model's outputs are computed
            assert torch.equal(said(tiny_llama), said(dense))
        assert torch.equal(said(tiny_llama), said(dense))
    assert all(map(torch.equal, tiny_llama.parameters(), dense.parameters()))
    network.write()
    assert all(map(torch.equal, tiny_llama.parameters(), masked.parameters()))
    assert torch.equal(said(tiny_llama), said(masked))


def test_the_dense_model_is_back_when_its_network_is_gone(tiny_llama: LlamaForCausalLM) -> None:
    expected = tiny_llama(WINDOWS["input_ids"]).logits
    prepared = prepare(tiny_llama, None, PruneConfig(precision="fp32", measured=4, held_out=2), examples=WINDOWS)
    assert not torch.equal(tiny_llama(WINDOWS["input_ids"]).logits, expected)
    del prepared
    assert torch.equal(tiny_llama(WINDOWS["input_ids"]).logits, expected)


def test_masks_are_the_pattern_in_the_chosen_order(prepared: Prepared) -> None:
    network = prepared.network
    Random().solve(network, prepared.run)
    for problem in network.problems:
        order = network.orders[problem.name]
        for part in problem.parts:
            stored = network.masks[part.layer][:, part.columns[order]]
            assert torch.equal(
                stored, network.pattern_of(problem).mask(network.scores[part.layer][:, part.columns[order]])
            )


def test_orders_set_one_after_the_other_leave_no_trace(prepared: Prepared) -> None:
    network = prepared.network
    before = {name: mask.clone() for name, mask in network.masks.items()}
    Random().solve(network, prepared.run)
    assert any(not torch.equal(before[name], mask) for name, mask in network.masks.items())
    network.set_orders(network.identity())
    assert all(torch.equal(before[name], mask) for name, mask in network.masks.items())


def test_a_layer_that_cannot_be_scored_is_named(prepared: Prepared) -> None:
    network = prepared.network
    moments = {site: -moments for site, moments in network.statistics.moments.items()}
    wrong, first = Statistics(moments, {}, 1), prepared.outline.layers[0].name
    with pytest.raises(PermpruneError, match=f"{first}: .* no Cholesky factor"):
        MaskedLayers(
            dataclasses.replace(prepared.outline, problems=[]),
            statistics=wrong,
            saliency=OBS(),
            patterns=network.patterns,
            held=network.held,
        )


def test_gradients_are_those_of_the_mean_loss(prepared: Prepared) -> None:
    network = prepared.network
    found = network.gradients(WINDOWS[:6], Objective())
    for layer in network.layers.values():
        layer.module.weight.requires_grad_(True)
    said = next_token(network.model, WINDOWS[:6])
    total, count = said.loss(), said.terms
    (total / count).backward()
    assert found.loss == pytest.approx(float(total.detach()) / count, rel=1e-5)
    assert found.count == count
    for name, layer in network.layers.items():
        torch.testing.assert_close(found.weight[name], layer.module.weight.grad, rtol=1e-4, atol=1e-7)
    assert found.loss == pytest.approx(network.loss(WINDOWS[:6], Objective()), rel=1e-5)


def test_gradients_are_averaged_with_those_of_earlier_examples_in_their_memory(prepared: Prepared) -> None:
    network = prepared.network
    whole, first = network.gradients(WINDOWS[:6], Objective()), network.gradients(WINDOWS[:2], Objective())
    memory = {name: gradient.data_ptr() for name, gradient in first.weight.items()}
    found = network.gradients(WINDOWS[2:6], Objective(), first)
    assert found.count == whole.count
    for name, gradient in found.weight.items():
        torch.testing.assert_close(gradient, whole.weight[name], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.fisher[name], whole.fisher[name], rtol=1e-4, atol=1e-9)
        assert gradient.data_ptr() == memory[name]


def test_discounted_gradients_have_less_weight_in_a_mean(prepared: Prepared) -> None:
    network = prepared.network
    first, second = (network.gradients(part, Objective()) for part in (WINDOWS[:2], WINDOWS[2:6]))
    share = first.count / 2 / (first.count / 2 + second.count)
    means = [
        {name: own.lerp(earlier[name], share) for name, own in later.items()}
        for later, earlier in ((second.weight, first.weight), (second.fisher, first.fisher))
    ]
    found = network.gradients(WINDOWS[2:6], Objective(), first.discounted(0.5))
    assert found.count == first.count / 2 + second.count
    for name, gradient in found.weight.items():
        torch.testing.assert_close(gradient, means[0][name], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.fisher[name], means[1][name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_late_windows_count_in_a_long_mean_in_bf16(stored: torch.dtype, ranks: int) -> None:
    """Of a share that is below half the spacing of bf16 numbers, on average nothing is lost."""
    dense = make_tiny_llama().to(stored).float()  # type: ignore[arg-type]

    def change() -> float:
        """The part of the late windows' gradient in the mean, in units of their share of its terms."""
        model = copy.deepcopy(dense)
        set_origin(model, Origin("tiny", stored))
        config = PruneConfig(precision="bf16", measured=4, held_out=2)
        network = prepare(model, None, config, examples=WINDOWS).network
        late = network.gradients(WINDOWS[6:10], Objective())
        early = network.gradients(WINDOWS[:6], Objective())
        before = {name: gradient.float() for name, gradient in early.stored.items()}
        wanted = {name: gradient.float() - before[name] for name, gradient in late.stored.items()}
        found = network.gradients(WINDOWS[6:10], Objective(), dataclasses.replace(early, count=2047 * late.count))
        assert all(gradient.dtype == torch.bfloat16 for gradient in found.stored.values())
        moved = sum(float(((found.stored[name] - before[name]) * own).sum()) for name, own in wanted.items())
        return 2048 * moved / sum(float(own.square().sum()) for own in wanted.values())

    assert in_processes(ranks, change) == pytest.approx([1.0] * ranks, abs=0.1)


def test_slopes_of_batches_are_those_of_their_gradients(prepared: Prepared) -> None:
    network, generator = prepared.network, torch.Generator().manual_seed(0)
    natural = network.identity()
    orders = {p.name: torch.randperm(p.size, generator=generator) for p in network.problems}
    gradient = network.gradients(WINDOWS[:6], Objective()).weight
    found = network.slopes(WINDOWS[:6], Objective(), natural, orders)
    given = network.slopes_along(natural, orders, gradient)
    weights = dict(network.shown)
    for problem in network.problems:
        network.set_orders({problem.name: orders[problem.name]})
        expected = sum(
            float(((weight - weights[name]) * gradient[name]).sum()) for name, weight in network.shown.items()
        )
        network.set_orders(natural)
        assert found[problem.name] == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert found[problem.name] == pytest.approx(given[problem.name], rel=1e-3, abs=1e-7)
    assert all(layer.stored.grad is None for layer in network.layers.values())


@pytest.mark.parametrize("batch", [1, 3, 6])
def test_gradients_do_not_depend_on_the_batch(tiny_llama: LlamaForCausalLM, prepared: Prepared, batch: int) -> None:
    every = Objective(1.0, 1.0, 1.0, 1.0)
    expected = prepared.network.gradients(WINDOWS[:6], every)
    with prepared.network.dense_weights():
        dense = copy.deepcopy(tiny_llama)
    network = prepare(dense, None, dataclasses.replace(prepared.config, batch=batch), examples=WINDOWS).network
    sizes: list[int] = []
    dense.get_input_embeddings().register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    found = network.gradients(WINDOWS[:6], every)
    assert set(sizes) == {batch}
    assert found.loss == pytest.approx(expected.loss, rel=1e-5) and found.count == expected.count
    for name, slope in expected.weight.items():
        torch.testing.assert_close(found.weight[name], slope, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.fisher[name], expected.fisher[name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    "objective",
    [
        Objective(0, divergence=1.0),
        Objective(0, distillation=1.0),
        Objective(0, hidden_states=1.0),
        Objective(0, cosine=1.0),
    ],
)
def test_distances_to_the_dense_model_vanish_there_alone(prepared: Prepared, objective: Objective) -> None:
    network = prepared.network
    found = network.gradients(WINDOWS[:4], objective)
    assert found.loss > 1e-4
    assert found.loss == pytest.approx(network.loss(WINDOWS[:4], objective), rel=1e-5)
    assert found.loss == pytest.approx(
        network.loss(WINDOWS[:4], objective, network.compute_teacher_outputs(WINDOWS[:4], objective)), rel=1e-5
    )
    network.show(network.dense)
    assert network.loss(WINDOWS[:4], objective) < 1e-2 * found.loss


def test_an_objective_is_the_weighted_sum_of_its_losses(prepared: Prepared) -> None:
    network = prepared.network
    weights = {"task": 1.0, "divergence": 2.0, "distillation": 3.0, "hidden_states": 4.0, "cosine": 5.0}
    losses = {name: network.loss(WINDOWS[:4], Objective(**{"task": 0.0, name: 1.0})) for name in weights}
    whole = network.loss(WINDOWS[:4], Objective(**weights))
    assert whole == pytest.approx(sum(weights[name] * losses[name] for name in weights), rel=1e-5)


def test_weights_packed_for_several_batches_are_those_of_the_orders(prepared: Prepared) -> None:
    network = prepared.network
    network.batch = 8  # 16 windows in a batch: enough rows for products that leave out what is pruned
    windows = Examples.of(torch.randint(128, (48, 16)))
    for _ in range(2):
        alone = [network.loss(part, Objective()) for part in windows.split(16)]
        assert network.loss(windows, Objective()) == pytest.approx(sum(alone) / 3, rel=1e-6)
        Random().solve(network, prepared.run)


def test_measures_are_those_of_the_weights_shown(prepared: Prepared) -> None:
    network = prepared.network
    masked = network.measures()
    assert [row.name for row in masked] == list(network.layers)
    for row in masked:
        name = row.name
        energy, mask = network.scores[name].square(), network.masks[name]
        moments = network.statistics.moments[network.sites[name]]
        lost, dense = network.dense[name] * ~mask, network.dense[name]
        assert row.kept == pytest.approx(float(energy[mask].sum() / energy.sum()), rel=1e-5)
        error = torch.trace(lost @ moments @ lost.T) / torch.trace(dense @ moments @ dense.T)
        assert row.error == pytest.approx(float(error), rel=1e-4)
        assert 0.5 < row.kept < 1 and 0 < row.error < 1
    network.show({name: weight / 2 for name, weight in network.dense.items()})
    for row in network.measures():
        assert row.kept == pytest.approx(1) and row.error == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("mode", ["fold", "gather"])
def test_stored_columns_are_the_order_in_which_the_pattern_holds(tiny_llama: LlamaForCausalLM, mode: str) -> None:
    network = prepare(tiny_llama, None, PruneConfig(mode=mode, precision="fp32"), examples=WINDOWS).network
    natural = network.stored_columns()
    assert all(torch.equal(columns, torch.arange(len(columns))) for columns in natural.values())
    generator = torch.Generator().manual_seed(0)
    network.set_orders({p.name: torch.randperm(p.size, generator=generator) for p in network.problems})
    for name, columns in network.stored_columns().items():
        assert torch.equal(columns.sort().values, torch.arange(len(columns)))
        assert not torch.equal(columns, torch.arange(len(columns)))
        assert torch.equal(
            network.masks[name][:, columns], network.patterns[name].mask(network.scores[name][:, columns])
        )


def test_columns_that_no_problem_moves_keep_their_places(tiny_llama: LlamaForCausalLM) -> None:
    prepared = prepare(tiny_llama, None, PruneConfig(pattern="4:8", precision="fp32"), examples=WINDOWS)
    Random().solve(prepared.network, prepared.run)
    for name, columns in prepared.network.stored_columns().items():  # heads are as wide as a group
        assert torch.equal(columns, torch.arange(len(columns))) == name.endswith("o_proj")


def test_weights_shown_stay_until_orders_are_set(prepared: Prepared) -> None:
    network = prepared.network
    name = "model.layers.1.mlp.up_proj"
    weight = torch.full_like(network.dense[name], 0.5)
    network.show({name: weight})
    assert torch.equal(network.shown[name], weight)
    with network.dense_weights():
        pass
    assert torch.equal(network.shown[name], weight)
    network.set_orders(network.orders)
    assert torch.equal(network.shown[name], network.dense[name] * network.masks[name])


@pytest.mark.usefixtures("retraced")
def test_examples_move_to_the_device_a_batch_at_a_time(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    to = Examples.to

    def count(self: Examples, device: torch.device) -> Examples:
        moved.append(len(self))
        return to(self, device)

    monkeypatch.setattr(Examples, "to", count)
    config = PruneConfig(precision="fp32", measured=4, held_out=3, batch=2)
    prepared = prepare(tiny_llama, None, config, examples=WINDOWS)
    assert max(moved) <= 2
    assert sum(moved) == 2 + 1 + len(prepared.measured)  # to trace, to ask what the model returns, and the statistics
    moved.clear()
    every = Objective(1.0, 1.0, 1.0, 1.0)
    prepared.network.gradients(prepared.run.train, every)
    prepared.network.loss(prepared.run.held_out, every)
    assert max(moved) <= 2


def test_gradients_in_bf16_are_those_of_fp32_weights_that_autocast_converts(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PruneConfig(precision="bf16", measured=4, held_out=2)
    network = prepare(tiny_llama, None, config, examples=WINDOWS).network
    seen: set[torch.dtype] = set()
    first = network.layers["model.layers.0.mlp.up_proj"].module
    first.register_forward_hook(lambda module, inputs, output: seen.add(module.weight.dtype), prepend=True)
    found = network.gradients(WINDOWS[:6], Objective())
    monkeypatch.setattr("permprune.pruning.running.autocast_dtype", lambda device: None)
    expected = network.gradients(WINDOWS[:6], Objective())
    assert seen == {torch.bfloat16, torch.float32}
    assert found.loss == expected.loss
    assert {gradient.dtype for gradient in found.weight.values()} == {torch.bfloat16}
    assert all(torch.equal(found.weight[name], expected.weight[name]) for name in found.weight)


def test_gradients_taken_in_the_backward_pass_are_those_of_the_mean_loss(prepared: Prepared) -> None:
    network, found = prepared.network, dict[str, torch.Tensor]()
    expected = network.gradients(WINDOWS[:8], Objective()).weight  # two batches

    def take(name: str, gradient: torch.Tensor) -> None:
        found[name] = gradient.clone()
        assert sum(layer.stored.grad is None for layer in network.layers.values()) >= len(found)

    network.take_gradients(WINDOWS[:8], Objective(), take)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    assert all(layer.stored.grad is None for layer in network.layers.values())
