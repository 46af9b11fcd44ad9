"""Mixtures of experts: their matrices are pruned, measured and reordered one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from permprune import prune, verify
from permprune.calibration.moments import FEWEST
from permprune.calibration.statistics import calibrate
from permprune.checkpoints.probe import probe_outputs
from permprune.config import PruneConfig
from permprune.coupling.discovery import discover
from permprune.coupling.trace import Untraceable
from permprune.engine.held import Held, Prepared, prepare
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.losses.objective import Objective
from permprune.losses.targets import next_token
from permprune.models.layers import Layer, block_linears, prunable_layers
from permprune.pattern import Pattern
from permprune.permuters.base import Random
from permprune.pruning.problem import build_problems
from permprune.saliency.metrics import SALIENCIES
from permprune.training.zeros import KeptZeros

from ..experts import FAMILIES, make, written_by

CONFIG = PruneConfig(precision="fp32", measured=32, held_out=16)
TWO_FOUR = Pattern(2, 4)
BOTH = [name if name in ("mixtral", "gpt-oss") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


def ready(family: str, mode: str = "fold", **changes: Any) -> Prepared:
    return prepare(make(family), None, CONFIG.replace(mode=mode, **changes), examples=written_by(family))


def fused(model: nn.Module) -> dict[str, Tensor]:
    """The 3-D weights, with the input channels last."""
    found = {name: p.detach() for name, p in model.named_parameters() if p.dim() == 3}
    transposed = any("router.bias" in name for name, _ in model.named_parameters())  # those of gpt-oss
    return {name: p.mT if transposed else p for name, p in found.items()}


@pytest.mark.parametrize("mode", ["fold", "gather"])
@pytest.mark.parametrize("family", BOTH)
def test_random_orders_keep_the_outputs_and_leave_two_of_every_four(family: str, mode: str) -> None:
    prepared = ready(family, mode)
    natural = prepared.network.measures()
    solution = Random().solve(prepared.network, prepared.run)
    ids = {"input_ids": written_by(family)[:16]}
    expected = probe_outputs(prepared.model, ids)
    pruned = Held(prepared, None).finish(solution, natural)
    torch.testing.assert_close(probe_outputs(pruned.model, ids), expected, rtol=1e-4, atol=1e-4)
    weights = fused(pruned.model)
    assert weights and len(weights) == 2 * sum("down_proj" in name for name in weights)
    for weight in weights.values():
        assert (weight.unflatten(-1, (-1, 4)).ne(0).sum(-1) == 2).all()
    assert verify(pruned.model).layers == len(prepared.outline.layers)
    orders = {space: table for space, table in pruned.tables.items() if ".experts.down_proj" in space}
    assert orders and all(len(table) == (4 if family == "deepseek-v3" else 3) for table in orders.values())
    for table in orders.values():
        assert len({tuple(order) for order in table.tolist()}) == len(table)  # each expert has its own
    at_experts = [gather for gather in pruned.gathers if any(name.endswith(".experts") for name in gather.inputs)]
    assert bool(at_experts) == (mode == "gather")


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_orders_are_those_of_each_expert_whatever_the_implementation(implementation: str) -> None:
    model, example = make("gpt-oss"), {"input_ids": written_by("gpt-oss")[:2]}
    expected = discover(model, example)
    model.config._experts_implementation = implementation
    found = discover(model, example)
    assert [(space.name, space.blocks) for space in found.spaces] == [
        (space.name, space.blocks) for space in expected.spaces
    ]
    assert model.config._experts_implementation == implementation


def test_problems_have_the_columns_of_their_experts() -> None:
    model = make("gpt-oss")
    layers = prunable_layers(model, TWO_FOUR, ["*.0.mlp.experts.1.*"])
    coupling = discover(model, {"input_ids": written_by("gpt-oss")[:2]})
    problems = {problem.name: problem for problem in build_problems(coupling, layers, TWO_FOUR, "fold")}
    for block in range(2):
        for expert in range(3):
            base = f"model.layers.{block}.mlp.experts.down_proj.input"
            if (block, expert) == (0, 1):
                assert f"{base}[1]" not in problems
                continue
            (part,) = problems[f"{base}[{expert}]"].parts
            assert part.layer == f"model.layers.{block}.mlp.experts.{expert}.down_proj"
            assert part.site == f"{base}[{expert}]"
            assert torch.equal(part.columns, torch.arange(48))
    residual = {part.layer: part for part in problems["residual"].parts}
    read = [name for name in residual if "experts" in name]
    assert len(read) == 5 and all(name.endswith("gate_up_proj") for name in read)


def test_moments_are_those_of_the_tokens_of_each_expert() -> None:
    model, ids = make("mixtral"), written_by("mixtral")
    module = model.model.layers[1].mlp.experts
    read: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_pre_hook(lambda _, args: read.append(args[:2]))
    statistics = measured(model, Examples.of(ids))
    handle.remove()
    hidden, index = (torch.cat(parts) for parts in zip(*read[1:], strict=True))  # the first run counts terms
    for expert in range(3):
        x = hidden[(index == expert).any(1)]
        assert len(x) > FEWEST
        moments = statistics.moments[f"model.layers.1.mlp.experts.gate_up_proj.input[{expert}]"]
        torch.testing.assert_close(moments, x.T @ x / len(x))
        x = module._apply_gate(x @ module.gate_up_proj[expert].T)
        moments = statistics.moments[f"model.layers.1.mlp.experts.down_proj.input[{expert}]"]
        torch.testing.assert_close(moments, x.T @ x / len(x), rtol=1e-4, atol=1e-4)


def measured(model: nn.Module, examples: Examples, **options: Any) -> Any:
    layers = [layer for layer in block_linears(model) if layer.expert is not None]
    sites = {layer.name: layer.input_of(f"{layer.parameter}.input") for layer in layers}
    return calibrate(model, layers, sites, examples, next_token, dtype=torch.float32, batch=16, **options)


def test_an_expert_that_few_tokens_reach_is_measured_on_all(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = make("mixtral"), written_by("mixtral")[:32]
    module = model.model.layers[0].mlp.experts
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[2] = 0
        model.model.layers[0].mlp.gate.register_forward_hook(lambda *_: never(2, _[2]))
    hidden: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    statistics = measured(model, Examples.of(ids), memory=20_000)
    assert "1 of 6 experts read fewer than 128 calibration tokens" in caplog.text
    x = torch.cat(hidden[-2:])  # the last pass
    moments = statistics.moments["model.layers.0.mlp.experts.gate_up_proj.input[2]"]
    torch.testing.assert_close(moments, x.T @ x / len(x))
    x = module._apply_gate(x @ module.gate_up_proj[2].T)
    moments = statistics.moments["model.layers.0.mlp.experts.down_proj.input[2]"]
    torch.testing.assert_close(moments, x.T @ x / len(x), rtol=1e-4, atol=1e-4)
    fisher = statistics.fisher["model.layers.0.mlp.experts.2.down_proj"]
    others = statistics.fisher["model.layers.0.mlp.experts.1.down_proj"]
    assert len(set(fisher.tolist())) == 1 and 0 < fisher[0] < 1e-3 * others.mean()


def never(expert: int, routed: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """A router's output with the two experts that are not `expert`."""
    logits, weights, index = routed
    others = torch.tensor([other for other in range(3) if other != expert])
    return logits, weights, others.expand_as(index)


def test_padding_does_not_count() -> None:
    model, ids = make("qwen3-moe"), written_by("qwen3-moe")
    mask = torch.ones_like(ids)
    padded = torch.cat([ids, torch.zeros_like(ids)], 1)
    both = Examples({"input_ids": padded, "attention_mask": torch.cat([mask, torch.zeros_like(mask)], 1)})
    alone = Examples({"input_ids": ids, "attention_mask": mask})
    found, expected = (measured(model, examples) for examples in (both, alone))
    for site, moments in expected.moments.items():
        torch.testing.assert_close(found.moments[site], moments, rtol=1e-4, atol=1e-4)
    for name, fisher in expected.fisher.items():
        torch.testing.assert_close(found.fisher[name], fisher, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
def test_gradients_are_those_of_the_model(family: str, recompute: bool) -> None:
    prepared = ready(family, recompute=recompute)
    network, examples = prepared.network, prepared.run.train[:4]
    found = network.gradients(examples, Objective())
    model = prepared.model.requires_grad_(True)
    ids = examples["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    parameters = dict(model.named_parameters())
    for name, layer in network.layers.items():
        expected = layer.part_of(parameters[layer.parameter].grad)
        torch.testing.assert_close(found.weight[name], expected, rtol=1e-3, atol=1e-5)
    assert any(fisher.any() for name, fisher in found.fisher.items() if ".experts." in name)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_newton_loses_less_than_no_order(family: str) -> None:
    ids = written_by(family, 192)
    fresh, losses = ids[:64], {}
    for method in ("none", "newton:rounds=6"):
        pruned = prune(make(family), order=method, precision="fp32", examples=ids[64:])
        with torch.no_grad():
            losses[method] = float(pruned.model(input_ids=fresh, labels=fresh).loss)
    assert losses["newton:rounds=6"] < losses["none"] - 0.01


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ria", "reconstruction:candidates=1", "learned:rounds=2", "newton:rounds=1"])
@pytest.mark.parametrize("mode", ["fold", "gather"])
def test_permuters_order_experts(method: str, mode: str) -> None:
    pruned = prune(make("mixtral"), order=method, mode=mode, precision="fp32", examples=written_by("mixtral")[:24])
    verify(pruned.model)
    table = pruned.tables["model.layers.0.mlp.experts.down_proj.input"]
    assert (table != torch.arange(48)).any(1).all() or "rounds" in method


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"saliency": name} for name in SALIENCIES] + [{"pattern": "mixed", "candidates": ("6:8", "2:4")}]
)
def test_every_saliency_and_a_mix_of_patterns(settings: dict[str, Any]) -> None:
    pruned = prune(make("gpt-oss"), order="ria", precision="fp32", examples=written_by("gpt-oss")[:24], **settings)
    verify(pruned.model)
    experts = [layer for layer in pruned.layers if ".experts." in layer.name]
    assert len(experts) == 12 and all(layer.transposed and 0 < layer.kept <= 1 for layer in experts)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), [("mixtral", "sparsegpt"), ("gpt-oss", "admm")])
def test_updates_change_the_weights_that_stay(family: str, method: str) -> None:
    plain, updated = (
        prune(make(family), order="ria", update=update, precision="fp32", examples=written_by(family))
        for update in ("none", method)
    )
    verify(updated.model)
    for name, weight in fused(plain.model).items():
        assert not torch.equal(fused(updated.model)[name], weight)


def test_an_excluded_expert_stays_dense_and_follows_the_orders_of_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for mode in ("fold", "gather"):
        prepared = ready("mixtral", mode, exclude=("*.experts.1.*",))
        natural = prepared.network.measures()
        solution = Random().solve(prepared.network, prepared.run)
        ids = {"input_ids": written_by("mixtral")[:16]}
        expected = probe_outputs(prepared.model, ids)
        pruned = Held(prepared, None).finish(solution, natural)
        torch.testing.assert_close(probe_outputs(pruned.model, ids), expected, rtol=1e-4, atol=1e-4)
        for weight in fused(pruned.model).values():
            assert (weight[1] != 0).all()
            assert (weight[[0, 2]].unflatten(-1, (-1, 4)).ne(0).sum(-1) == 2).all()
        assert prepared.dense.layers == ["model.layers.*.mlp.gate.weight"]


def test_a_model_that_cannot_be_traced_has_one_gather_for_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise Untraceable("no")

    monkeypatch.setattr("permprune.plan.discover", refuse)
    pruned = prune(make("mixtral"), order="ria", mode="gather", precision="fp32", examples=written_by("mixtral"))
    verify(pruned.model)
    places = [name for gather in pruned.gathers for name in gather.inputs]
    assert [name for name in places if "experts" in name] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert not pruned.tables
    again = prune(pruned.model, order="ria", mode="gather", precision="fp32", examples=written_by("mixtral"))
    verify(again.model)


def test_an_error_names_the_expert() -> None:
    model = make("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1, 0, 0] = float("nan")
    with pytest.raises(PermpruneError, match=r"model\.layers\.0\.mlp\.experts\.1\.down_proj holds NaN"):
        prunable_layers(model, TWO_FOUR)


def test_training_keeps_the_zeros_of_experts() -> None:
    model, ids = make("gpt-oss"), written_by("gpt-oss")[:4]
    (name, layer), *_ = [(layer.name, layer) for layer in block_linears(model) if layer.expert == 1]
    with torch.no_grad():
        layer.stored.zero_()
        layer.weight[:, ::2] = 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with KeptZeros(model, [name]):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert (layer.weight[:, 1::2] == 0).all() and (layer.weight[:, ::2] != 1).any()
    assert layer.stored[0].any()  # another expert, which is not held


def test_the_calibration_leaves_the_model_as_it_was() -> None:
    model = make("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured(model, Examples.of(written_by("mixtral")[:8]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config._experts_implementation == "batched_mm"
    assert isinstance(block_linears(model)[0], Layer)
