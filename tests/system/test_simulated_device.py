"""Models on a device other than the CPU: everything runs, and gives what it gives on the CPU."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import permprune
from permprune import Evaluation, Examples, FineTuning, Newton, PruneConfig
from permprune.engine.held import prepare
from permprune.forecasts.machine import Machine, Rates
from permprune.inference.pack import pack
from permprune.kv.cache import PrunedCache
from permprune.kv.config import KVConfig
from permprune.models.forward import cache_argument
from permprune.permuters.base import Identity, Permuter
from permprune.permuters.cp import CP
from permprune.permuters.learned import Learned
from permprune.permuters.reconstruction import Reconstruction
from permprune.permuters.registry import PERMUTERS
from permprune.permuters.trust_region import TrustRegion
from permprune.saliency.metrics import SALIENCIES
from permprune.system.failures import OutOfMemory
from permprune.updates.methods import UPDATES

from ..counted_run import counted, plan_for, read_there, trace_on_cpu
from ..fixtures import BLOCK, make_tiny_llama, small_checkpoint
from ..kv.reference import coded_channels
from ..permuters.test_permuters import FOLDED, WINDOWS, brief
from ..simulated_device import CPU, SIMULATED, SimulatedTensor, allocated, simulated_device

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("traced_on_cpu", "torch_only"),
    pytest.mark.filterwarnings("ignore:permprune has no kernels for simulated here"),
]

DEVICES = (CPU, SIMULATED)


@pytest.fixture
def traced_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    trace_on_cpu(monkeypatch)
    with simulated_device():
        yield


@pytest.fixture
def torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both devices run the same operators: native code, which runs on the CPU alone, rounds sums in another way."""
    monkeypatch.setattr("permprune.kernels.library.available", lambda: False)


@pytest.fixture
def simulated_best(monkeypatch: pytest.MonkeyPatch) -> None:
    read_there(monkeypatch)


def short(name: str) -> Permuter:
    """A method with as few steps as run all of its code."""
    method = brief(name)
    if isinstance(method, CP):
        return dataclasses.replace(method, escapes=1)
    if isinstance(method, Reconstruction):
        return dataclasses.replace(method, swaps=2, candidates=2)
    if isinstance(method, TrustRegion):
        method = dataclasses.replace(method, start=Identity(), rounds=2)
    return dataclasses.replace(method, steps=2) if isinstance(method, Learned) else method


def test_what_cuda_refuses_is_refused() -> None:
    x, y = torch.ones(3, device=SIMULATED), torch.ones(3)
    assert isinstance(x, SimulatedTensor) and x.device == SIMULATED
    for attempt in (
        lambda: x + y,
        lambda: y[x > 0],
        lambda: x.index_put_((torch.tensor([0]),), y[:1]),
        lambda: torch.mul(x, x, out=y),
        lambda: torch.cat([x, y]),
        lambda: torch.rand(3, device=SIMULATED, generator=torch.Generator()),
        lambda: x.exponential_(generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match="simulated:0"):
            attempt()
    with pytest.raises(RuntimeError):
        x.numpy()
    x[torch.tensor([0, 2])] *= torch.tensor(2.0)
    assert (x.cpu() + y).tolist() == [3, 2, 3]


@pytest.mark.parametrize(
    ("name", "mode"), [*itertools.product(PERMUTERS, ["gather"]), *itertools.product(FOLDED, ["fold"])]
)
def test_orders(name: str, mode: str) -> None:
    config = PruneConfig(mode=mode, precision="fp32", measured=6, held_out=4)
    found = []
    for device in DEVICES:
        prepared = prepare(make_tiny_llama().to(device), None, config, examples=WINDOWS)
        found.append(short(name).solve(prepared.network, prepared.run).orders)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(order, found[1][problem]) for problem, order in found[0].items())


def pruned_on(device: torch.device, model: PreTrainedModel, examples: Any, **settings: Any) -> dict[str, Tensor]:
    """Prune the model on a device; returns its weights, on the CPU."""
    pruned = permprune.prune(model.to(device), examples=examples, precision="fp32", **settings)
    weights = pruned.model.state_dict()
    assert all(weight.device == device for weight in weights.values())
    return {name: weight.cpu() for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("saliency", "update"),
    [*((name, "none") for name in SALIENCIES), *(("wanda", name) for name in UPDATES if name != "none")],
)
def test_weights(saliency: str, update: str) -> None:
    settings = {"order": "ria", "saliency": saliency, "update": update}
    one, other = (pruned_on(device, make_tiny_llama(), WINDOWS, **settings) for device in DEVICES)
    assert one.keys() == other.keys()
    torch.testing.assert_close(list(other.values()), list(one.values()))


def test_orders_masks_and_weights_together() -> None:
    recipe = {"order": Newton(start=Identity(), rounds=1, examples=4), "update": "admm", "train": "steps=2"}
    one, other = (pruned_on(device, make_tiny_llama(), WINDOWS, **recipe) for device in DEVICES)
    torch.testing.assert_close(list(other.values()), list(one.values()))


def test_labels_and_padding() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**BLOCK, vocab_size=128, num_labels=3))
    mask = torch.ones_like(WINDOWS)
    mask[:, 10:] = 0
    examples = Examples({"input_ids": WINDOWS, "attention_mask": mask, "labels": torch.arange(24) % 3})
    method = Newton(start=Identity(), rounds=1, examples=4)
    # a parameter that becomes one of this device keeps hooks that PyTorch does not call any more
    found = [pruned_on(device, copy.deepcopy(model), examples, order=method) for device in DEVICES]
    torch.testing.assert_close(list(found[1].values()), list(found[0].values()))


@pytest.mark.parametrize(("mode", "place"), [("fold", "none"), ("fold", "disk"), ("gather", "disk")])
def test_folders(mode: str, place: str, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, request: Any) -> None:
    config = PruneConfig(
        order="ria",
        calibration=str(tiny_text),
        length=16,
        samples=24,
        precision="fp32",
        mode=mode,
        offload=place,
    )
    evaluation = Evaluation(str(tiny_text), 4, 16)
    options = FineTuning(
        str(tiny_text), train="norms", epochs=1, rows=16, length=16, teacher=str(tiny_checkpoint), hidden=1e-5
    )
    found = []
    for device in DEVICES:
        if device == SIMULATED:
            request.getfixturevalue("simulated_best")
        folder, tuned = tmp_path / device.type, tmp_path / f"tuned-{device.type}"
        record = permprune.prune_to_folder(str(tiny_checkpoint), folder, config, evaluation=evaluation)
        assert ("model.residual" in record.permutations) == (mode == "fold")
        assert permprune.verify(folder).layers == 14
        measured = permprune.evaluate(folder, evaluation).value
        trained = permprune.finetune(str(folder), tuned, options).result.value
        found.append((record.permutations, record.gathers, measured, trained))
    assert permprune.read_model(str(folder))[0].device == SIMULATED
    assert found[1][:2] == found[0][:2]
    assert found[1][2:] == pytest.approx(found[0][2:], rel=1e-5)


@torch.no_grad()
def test_caches_in_few_bits() -> None:
    tokens, mask, found = torch.randint(5, 128, (2, 50)), torch.ones(2, 50, dtype=torch.int64), []
    mask[0, :7] = 0
    channels = {i: (coded_channels([2, 6], 8, moving=True), coded_channels([3, 4], 8)) for i in range(2)}
    for device in DEVICES:
        with simulated_device():
            model = make_tiny_llama().to(device)
            cache = PrunedCache(model, KVConfig("mixed", "mixed", window=8, sinks=2), channels)
            for first, last in ((0, 40), (40, 41), (41, 50)):
                inputs = {"input_ids": tokens[:, first:last].to(device), "attention_mask": mask[:, :last].to(device)}
                logits = model(**inputs, **cache_argument(model, cache)).logits.cpu()
            found.append(logits)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [("fp32", 1e-5), ("bf16", 0.02), ("int8", 1e-5)])
def test_packed_models(dtype: str, error: float) -> None:
    found = []
    for device in DEVICES:
        pruned = permprune.prune(
            make_tiny_llama().to(device), examples=WINDOWS, precision="fp32", order="ria", mode="gather"
        )
        pack(pruned.model, {layer.name: layer.pattern for layer in pruned.layers}, dtype=dtype)
        with torch.no_grad():
            found.append(pruned.model(WINDOWS[:2].to(device), use_cache=False).logits.cpu())
    assert float((found[1] - found[0]).abs().max()) <= error * float(found[0].abs().max())


@pytest.fixture
def planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates(1e12, 1e12, 1e12, 1e12)
    plan_for(monkeypatch, Machine("simulated", SIMULATED, torch.float32, memory=2**30, sheet=rates))


SEARCH = Newton(start=Identity(), rounds=1, swaps=1)
TRAINED: dict[str, Any] = {"order": SEARCH, "train": "steps=1"}
UPDATED: dict[str, Any] = {"order": "none", "update": "admm", "train": "steps=1"}
BLOCKS: dict[str, Any] = {"order": "none", "train": "steps=2:blocks=true"}

WIDE = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256}


@pytest.mark.usefixtures("simulated_best", "planned_for", "small_blocks")
@pytest.mark.parametrize(
    ("dtype", "settings", "shape"),
    [
        (torch.bfloat16, TRAINED, {"num_hidden_layers": 4}),
        (torch.float32, {**TRAINED, "recompute": True}, {"num_hidden_layers": 2, "intermediate_size": 256}),
        (torch.float32, {"order": "reconstruction:swaps=1:candidates=1", "mode": "gather"}, {"num_hidden_layers": 2}),
        (torch.bfloat16, {**TRAINED, "recompute": True, "batch": 1, "offload": "host"}, WIDE),
        (torch.float32, {"order": "newton:rounds=0", "train": "steps=1"}, {"num_hidden_layers": 3}),
        (torch.bfloat16, {**UPDATED, "recompute": True, "batch": 1, "offload": "host"}, WIDE),
        (torch.bfloat16, {**BLOCKS, "recompute": True, "batch": 1, "offload": "host"}, WIDE),
        (torch.float32, BLOCKS, {"num_hidden_layers": 3}),
    ],
)
def test_device_and_host_hold_what_was_forecast(
    dtype: torch.dtype,
    settings: dict[str, Any],
    shape: dict[str, int],
    tmp_path: Path,
    tiny_text: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    source = small_checkpoint(tmp_path / "source", tiny_tokenizer, dtype, **shape)
    config = PruneConfig(calibration=str(tiny_text), length=16, samples=24, precision="fp32").replace(**settings)
    found = permprune.forecast(str(source), config, windows=4)
    with counted() as stages:  # a stage of such small tensors has a few more
        permprune.prune_to_folder(str(source), tmp_path / "out", config, evaluation=Evaluation(str(tiny_text), 4, 16))
    by_stage = stages.beside(found)
    for place in range(2 if config.offload == "host" else 1):  # else the host holds little but a batch of a few tokens
        most = [max(held[place] for held in one) for one in zip(*by_stage.values(), strict=True)]
        assert most[0] == pytest.approx(most[1], rel=0.1)
        for name, (taken, told) in by_stage.items():
            assert taken[place] <= 1.2 * told[place], name
    assert torch.isfinite(permprune.load(tmp_path / "out").get_parameter("lm_head.weight")).all()


@pytest.mark.usefixtures("simulated_best")
def test_a_full_device_ends_in_one_line(
    tmp_path: Path, tiny_text: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = small_checkpoint(tmp_path / "source", tiny_tokenizer, torch.bfloat16, num_hidden_layers=2)
    config = PruneConfig(order="ria", calibration=str(tiny_text), length=16, samples=24)
    with allocated() as device, pytest.raises(OutOfMemory, match="--set recompute=true"):
        device.limit = device.now + 250_000  # the weights fit, with their statistics they do not
        permprune.prune_to_folder(str(source), tmp_path / "out", config, evaluation=Evaluation(str(tiny_text), 4, 16))
    assert not (tmp_path / "out").exists()
