"""Calibration statistics against direct computations."""

import pytest
import torch
import torch.nn.functional as F

from permprune.calibration import statistics as statistics_module
from permprune.calibration.fisher import output_fisher, row_covariance, row_fisher
from permprune.calibration.moments import InputMoments
from permprune.calibration.statistics import Statistics, calibrate
from permprune.config import PruneConfig
from permprune.engine.held import prepare
from permprune.errors import PermpruneError
from permprune.examples import IGNORED, Examples
from permprune.losses.targets import next_token
from permprune.models.forward import Padding, frozen
from permprune.models.hooks import resumed, up_to_each
from permprune.models.layers import Layer, prunable_layers
from permprune.pattern import Pattern
from permprune.system import shelf
from permprune.system.shelf import Shelf

from ..modalities import EXAMPLES, make

WINDOWS = torch.randint(128, (5, 12), generator=torch.Generator().manual_seed(0))
SHARED = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "gate_proj": "mlp",
    "up_proj": "mlp",
}


def layers_and_sites(model) -> tuple[list[Layer], dict[str, str]]:
    """All linears; those that read one tensor share a site."""
    layers = prunable_layers(model, Pattern(2, 4))
    sites = {}
    for layer in layers:
        block, _, name = layer.name.split(".", 2)[-1].partition(".")
        sites[layer.name] = f"{block}.{SHARED.get(name.rpartition('.')[-1], name)}"
    return layers, sites


def statistics(model, dtype=torch.float32, **settings) -> Statistics:
    layers, sites = layers_and_sites(model)
    return calibrate(model, layers, sites, Examples.of(WINDOWS), next_token, dtype=dtype, **settings)


def assert_same(one: Statistics, other: Statistics, **tolerance) -> None:
    torch.testing.assert_close(one.moments, other.moments, **tolerance)
    torch.testing.assert_close(one.fisher, other.fisher, **tolerance)
    assert one.terms == other.terms


def test_moments_are_the_second_moments_of_what_each_layer_reads(tiny_llama):
    layers, sites = layers_and_sites(tiny_llama)
    read = {}
    handles = [
        layer.module.register_forward_pre_hook(lambda _, args, name=layer.name: read.update({name: args[0]}))
        for layer in layers
    ]
    with torch.no_grad():
        tiny_llama(WINDOWS)
    for handle in handles:
        handle.remove()
    found = statistics(tiny_llama, batch=2)
    assert set(found.moments) == set(sites.values()) and len(found.moments) == 8
    for layer in layers:
        x = read[layer.name].flatten(0, 1).double()
        expected = (x.T @ x / len(x)).float()
        torch.testing.assert_close(found.moments[sites[layer.name]], expected, rtol=1e-4, atol=1e-7)


def test_fisher_is_the_mean_square_of_the_output_gradient_of_each_token(tiny_llama):
    """Differentiate by a zero that is added to one layer's output, one window at a time."""
    layers, _ = layers_and_sites(tiny_llama)
    found = statistics(tiny_llama, batch=2)
    assert found.terms == 5 * 11 and not found.one_label_per_example
    for layer in layers:
        total = torch.zeros(len(layer.weight))
        for window in WINDOWS:
            nudge = torch.zeros(1, len(window), len(layer.weight), requires_grad=True)
            handle = layer.module.register_forward_hook(lambda _, __, output, nudge=nudge: output + nudge)
            logits = tiny_llama(window[None]).logits[0, :-1]
            handle.remove()
            terms = F.cross_entropy(logits, window[1:], reduction="none")
            (gradient,) = torch.autograd.grad(terms.sum(), nudge)
            total += gradient[0].square().sum(0)
        torch.testing.assert_close(found.fisher[layer.name], total / (5 * 11), rtol=1e-3, atol=1e-9)


def test_whether_examples_have_one_label_does_not_depend_on_the_first(tiny_llama):
    layers, sites = layers_and_sites(tiny_llama)
    labels = WINDOWS.masked_fill(torch.arange(12) < 8, IGNORED)
    labels[0, :-1] = IGNORED
    examples = Examples({"input_ids": WINDOWS, "labels": labels})
    found = calibrate(tiny_llama, layers, sites, examples, next_token, dtype=torch.float32)
    assert found.terms == 1 + 4 * 4 and not found.one_label_per_example


@pytest.mark.parametrize("batch", [2, 5])
def test_fisher_of_examples_with_one_answer_is_that_of_their_gradients_by_the_weight(tiny_llama, batch):
    """Of windows of which one token counts: each one's gradient of a row, over the mean square of its inputs."""
    layers, sites = layers_and_sites(tiny_llama)
    labels = torch.full_like(WINDOWS, IGNORED)
    labels[:, -1] = WINDOWS[:, -1]
    examples = Examples({"input_ids": WINDOWS, "labels": labels})
    found = calibrate(tiny_llama, layers, sites, examples, next_token, dtype=torch.float32, batch=batch)
    assert found.terms == 5 and found.one_label_per_example
    for layer in layers:
        total = torch.zeros(len(layer.weight))
        for window in WINDOWS:
            read = []
            handle = layer.module.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0].detach()))
            loss = F.cross_entropy(tiny_llama(window[None]).logits[0, -2], window[-1])
            handle.remove()
            (gradient,) = torch.autograd.grad(loss, layer.module.weight)
            total += gradient.square().sum(1) / read[0].square().sum(-1).mean()
        torch.testing.assert_close(found.fisher[layer.name], total / 5, rtol=1e-3, atol=1e-9)


def test_row_fisher_of_single_positions_is_the_sum_of_their_squares():
    x, g = torch.randn(6, 1, 8), torch.randn(6, 1, 4)
    torch.testing.assert_close(row_fisher(x, g), g[:, 0].square().sum(0))


def test_row_fisher_of_positions_that_push_together_grows_with_their_square():
    x, g = torch.randn(1, 1, 8).expand(1, 5, 8), torch.randn(1, 1, 4).expand(1, 5, 4)
    torch.testing.assert_close(row_fisher(x, g), 25 * g[0, 0].square())


@pytest.mark.parametrize("positions", [2, 7, 60])
def test_row_fisher_is_that_of_the_gradient_of_each_example(positions):
    x, g = torch.randn(3, positions, 32) + 1, torch.randn(3, positions, 24)
    apart = torch.einsum("epr,epc->erc", g.double(), x.double()).square().sum(2)
    expected = (apart / x.double().square().sum(2).mean(1)[:, None]).sum(0)
    torch.testing.assert_close(row_fisher(x, g), expected.float())


@pytest.mark.parametrize("positions", [1, 7, 60])
def test_row_covariance_is_that_of_the_gradients_of_the_examples(positions):
    x, g, mask = torch.randn(3, positions, 8), torch.randn(3, positions, 5), torch.rand(3, positions) < 0.6
    mask[:, 0] = True
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for one in range(3):
        own, slope = x[one][mask[one]].double(), g[one][mask[one]].double()
        weight = slope.T @ own
        expected += weight @ weight.T / own.square().sum(1).mean()
    found = row_covariance(x, g, mask)
    torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(found.diagonal(), row_fisher(x, g, mask))


def test_row_covariance_in_bf16_survives_gradients_that_add_up_to_nothing():
    x = (torch.randn(4, 9, 16) + 30).bfloat16()
    g = torch.randn(4, 9, 6)
    g = (g - g.mean(1, keepdim=True)).bfloat16()
    g[:, 0] -= g.float().sum(1).bfloat16()
    found, expected = row_covariance(x, g), row_covariance(x.float(), g.float())
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("shape", [(3, 6), (3, 2, 3)])
def test_row_fisher_leaves_padding_out(shape):
    x, g = torch.randn(*shape, 8), torch.randn(*shape, 4)
    mask = torch.rand(shape) < 0.6
    mask.flatten(1)[:, 0] = True
    apart = [row_fisher(x[i][mask[i]][None], g[i][mask[i]][None]) for i in range(3)]
    torch.testing.assert_close(row_fisher(x, g, mask), torch.stack(apart).sum(0))


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_the_batch_size_changes_nothing(tiny_llama, batch):
    assert_same(statistics(tiny_llama), statistics(tiny_llama, batch=batch), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("memory", [1, 4 * 2 * 32**2, 4 * 64**2])
def test_a_memory_limit_gives_the_same_statistics_in_several_passes(tiny_llama, memory, caplog):
    caplog.set_level("INFO", "permprune")
    limited = statistics(tiny_llama, memory=memory)
    passes = {1: 8, 4 * 2 * 32**2: 6, 4 * 64**2: 4}[memory]
    assert f"calibration needs {passes} passes" in caplog.text
    assert_same(limited, statistics(tiny_llama), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("memory", [None, 1])
def test_a_pass_forward_gives_the_same_moments(tiny_llama, memory):
    whole, found = statistics(tiny_llama), statistics(tiny_llama, fisher=False, memory=memory)
    assert found.fisher == {} and not any(parameter.grad is not None for parameter in tiny_llama.parameters())
    torch.testing.assert_close(found.moments, whole.moments, rtol=0, atol=0)


@pytest.mark.parametrize("fisher", [False, True])
def test_on_the_disk_each_matrix_is_written_once_and_never_read(tiny_llama, tmp_path, monkeypatch, fisher):
    """However many batches there are: they run through one block before the next."""
    whole, mapped, touched = statistics(tiny_llama, batch=1, fisher=fisher), shelf._File.mapped, []
    monkeypatch.setattr(shelf._File, "mapped", lambda file, held: touched.append(held) or mapped(file, held))
    found = statistics(tiny_llama, batch=1, fisher=fisher, shelf=Shelf("disk", tmp_path))
    assert len(touched) == len(whole.moments)
    assert_same(found, whole, rtol=0, atol=0)


@pytest.mark.parametrize("data", EXAMPLES)
def test_models_of_all_kinds_run_through_one_block_before_the_next(data, tmp_path, monkeypatch):
    """Those of an encoder before those of a decoder, which reads what the last of them computes."""
    model, examples, passes = make(data), EXAMPLES[data](), []
    network = prepare(model, None, PruneConfig(precision="fp32", measured=4, held_out=2), examples=examples).network
    given = (model, [*network.layers.values()], network.sites, examples, network.task)
    monkeypatch.setattr(statistics_module, "resumed", lambda *args: passes.append(args) or resumed(*args))
    with network.dense_weights():
        whole = calibrate(*given, dtype=torch.float32, fisher=False)
        found = calibrate(*given, dtype=torch.float32, fisher=False, shelf=Shelf("disk", tmp_path))
    assert len(passes) > 1 + len(up_to_each(model))  # with which it is tried whether the model does so
    assert found.moments.keys() == whole.moments.keys()
    torch.testing.assert_close(dict(found.moments), dict(whole.moments), rtol=0, atol=0)


def test_blocks_that_share_more_than_their_outputs_run_in_whole_passes(tiny_llama, tmp_path):
    """As where later blocks read keys and values of earlier ones."""
    shared = {}
    first, second = tiny_llama.model.layers
    tiny_llama.model.register_forward_pre_hook(lambda *_: shared.clear())
    first.mlp.register_forward_hook(lambda *called: shared.update(states=called[-1]))
    second.mlp.register_forward_hook(lambda *called: called[-1] + shared["states"])
    found = statistics(tiny_llama, fisher=False, shelf=Shelf("disk", tmp_path))
    assert_same(found, statistics(tiny_llama, fisher=False), rtol=0, atol=0)


def test_bf16_activations_give_nearly_the_same_fp32_statistics(tiny_llama):
    coarse, fine = statistics(tiny_llama, torch.bfloat16), statistics(tiny_llama)
    for site, matrix in coarse.moments.items():
        assert matrix.dtype == torch.float32
        assert (matrix - fine.moments[site]).norm() < 0.05 * fine.moments[site].norm()
    for layer, diagonal in coarse.fisher.items():
        assert diagonal.dtype == torch.float32
        assert (diagonal - fine.fisher[layer]).norm() < 0.1 * fine.fisher[layer].norm()


def test_products_are_formed_in_fp32_whatever_the_activations(tiny_llama):
    layer = prunable_layers(tiny_llama, Pattern(2, 4))[0]
    read = []
    handle = layer.module.register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(0, 1).double()))
    inputs = InputMoments({"here": layer})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), inputs.observe(Padding()):
        for part in WINDOWS.split(2):
            tiny_llama(part)
    moments = inputs.result()
    handle.remove()
    x = torch.cat(read)
    exact = x.T @ x / len(x)
    error = (moments["here"] - exact).norm() / exact.norm()
    assert moments["here"].dtype == torch.float32 and error < 1e-6


def test_leaves_the_model_as_it_was(tiny_llama):
    tiny_llama.train()
    tiny_llama.lm_head.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in tiny_llama.named_parameters()}
    wanted = {name: p.requires_grad for name, p in tiny_llama.named_parameters()}
    statistics(tiny_llama)
    assert tiny_llama.training
    assert {name: p.requires_grad for name, p in tiny_llama.named_parameters()} == wanted
    for name, parameter in tiny_llama.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_llama.modules())


def test_frozen_puts_things_back_after_an_error(tiny_llama):
    tiny_llama.train()
    with pytest.raises(KeyError), frozen(tiny_llama):
        assert not tiny_llama.training and not any(p.requires_grad for p in tiny_llama.parameters())
        raise KeyError
    assert tiny_llama.training and all(p.requires_grad for p in tiny_llama.parameters())


def test_output_fisher_adds_up_over_backward_passes(tiny_llama):
    layers, _ = layers_and_sites(tiny_llama)
    sums = {layer.name: torch.zeros(len(layer.weight)) for layer in layers}
    with output_fisher(layers, sums, one_label_per_example=False, padding=Padding()):
        for window in WINDOWS.split(2):
            next_token(tiny_llama, Examples.of(window)).loss().backward()
    expected = statistics(tiny_llama).fisher
    for name, total in sums.items():
        torch.testing.assert_close(total / (5 * 11), expected[name], rtol=1e-4, atol=1e-9)


def test_refuses_a_loss_that_is_not_finite(tiny_llama):
    tiny_llama.model.embed_tokens.weight.data[WINDOWS[0, 0]] = float("nan")
    with pytest.raises(PermpruneError, match="loss on the calibration data is not finite"):
        statistics(tiny_llama)


def test_refuses_activations_whose_squares_overflow(tiny_llama):
    mlp = tiny_llama.model.layers[0].mlp
    mlp.up_proj.weight.data *= 1e25
    mlp.down_proj.weight.data.zero_()
    with pytest.raises(PermpruneError, match=r"activations at 0\.mlp\.down_proj overflow"):
        statistics(tiny_llama)


def test_refuses_gradients_whose_squares_overflow(tiny_llama):
    mlp = tiny_llama.model.layers[0].mlp
    mlp.up_proj.weight.data *= 1e-25
    mlp.down_proj.weight.data *= 1e25
    with pytest.raises(PermpruneError, match=r"gradients at model\.layers\.0\.mlp\.up_proj overflow"):
        statistics(tiny_llama)
