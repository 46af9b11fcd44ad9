"""Forecasts from the config alone, compared with what runs take."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers as tf
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import permprune
from permprune.config import PruneConfig
from permprune.engine.held import prepare
from permprune.engine.measuring import Evaluation
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.forecasts.activations import count_activations
from permprune.forecasts.fitting import fit_memory
from permprune.forecasts.forecast import Forecast
from permprune.forecasts.machine import BUS, GPUS, Machine, Rates, this_machine
from permprune.forecasts.resources import Stage, Work
from permprune.forecasts.run import TRANSCRIBED, UNENDED
from permprune.jobs.prune import prune_to_folder
from permprune.losses.objective import Objective
from permprune.losses.targets import next_token
from permprune.options import parse_bytes
from permprune.permuters.registry import PERMUTERS

from ..held_bytes import Held

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 5}
SETTINGS = PruneConfig(length=16, samples=24, precision="fp32")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of other threads are not counted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config_folder(tmp_path: Path) -> Path:
    """A folder with a config and nothing else."""
    LlamaConfig(vocab_size=128, architectures=["LlamaForCausalLM"], **SIZES).save_pretrained(tmp_path / "config")
    return tmp_path / "config"


def forecast(source: Path, *, gpu: str | None = None, processes: int | None = None, **changes: Any) -> Forecast:
    return permprune.forecast(str(source), SETTINGS.replace(**changes), gpu=gpu, processes=processes)


def stage_of(found: Forecast, name: str) -> Stage:
    (stage,) = [one for one in found.stages if one.name == name]
    return stage


def bytes_of(found: Forecast, stage: str) -> dict[str, int]:
    """The bytes of a stage by part."""
    return {part.name: part.bytes for part in stage_of(found, stage).parts}


def test_the_parts_are_the_tensors_of_a_run(tiny_llama: LlamaForCausalLM, tiny_checkpoint: Path) -> None:
    found = forecast(tiny_checkpoint, order="newton:rounds=1")
    parts = bytes_of(found, "newton: proposals")
    ids = torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(1))
    network = prepare(tiny_llama, None, SETTINGS, examples=permprune.Examples.of(ids)).network

    def counted(tensors: Any) -> int:
        return sum(tensor.nbytes for tensor in tensors.values())

    assert parts["weights"] == sum(parameter.nbytes for parameter in tiny_llama.parameters())
    assert parts["masks"] == counted(network.masks) // 8
    assert parts["second moments"] == network.statistics.moments.nbytes
    gradients = network.gradients(permprune.Examples.of(ids[:8]), permprune.Objective(divergence=0.0))
    assert parts["gradients"] == counted(gradients.weight)
    assert found.disk["checkpoint"] == sum(parameter.nbytes for parameter in tiny_llama.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "update"),
    [
        ("none", "none"),
        ("ria", "none"),
        ("cp:escapes=1", "none"),
        ("reconstruction", "none"),
        ("newton:rounds=1", "none"),
        ("none", "admm"),
    ],
)
def test_the_peak_is_within_15_percent(
    method: str, update: str, tmp_path: Path, tiny_text: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    config = SETTINGS.replace(order=method, update=update, calibration=str(tiny_text))
    source = tmp_path / "source"
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **SIZES)).save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    found = permprune.forecast(str(source), config)
    assert found.seconds  # measures the rates of this machine, once in a process, with tensors of its own
    with Held() as held:
        prune_to_folder(str(source), tmp_path / "out", config, evaluation=Evaluation(str(tiny_text), 4, 16))
    assert held.peak == pytest.approx(found.tensors, rel=0.15)


@pytest.mark.parametrize("method", PERMUTERS)
def test_every_method_is_forecast(config_folder: Path, method: str) -> None:
    found = forecast(config_folder, gpu="h100", order=method)
    names = [stage.name for stage in found.stages]
    assert names[:2] == ["load", "calibrate"] and names[-2:] == ["evaluate", "write"]
    assert len(names) == len(set(names))
    assert found.device is not None and found.device > sum(bytes_of(found, "load").values()) / 3
    assert min(seconds for seconds in found.seconds.values() if seconds is not None) >= 0
    json.dumps(found.to_json())


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["tiny_bert", "tiny_vit", "tiny_ctc", "tiny_whisper"])
def test_models_of_every_kind_are_forecast(fixture: str, request: pytest.FixtureRequest) -> None:
    found = permprune.forecast(str(request.getfixturevalue(fixture)), PruneConfig(order="ria"), gpu="h100")
    assert bytes_of(found, "calibrate")["activations"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("fixture", "passes"), [("tiny_ctc", 3), ("tiny_whisper", UNENDED + 2 * TRANSCRIBED)])
def test_an_evaluation_counts_the_transcripts_that_a_model_writes(
    fixture: str, passes: float, request: pytest.FixtureRequest
) -> None:
    config = PruneConfig(order="ria")
    found = permprune.forecast(str(request.getfixturevalue(fixture)), config, windows=config.measured, gpu="h100")
    evaluated, calibrated, written = (stage_of(found, name).work for name in ("evaluate", "calibrate", "write"))
    assert evaluated and calibrated and written
    passed = evaluated.products_fp32 - 2 * written.products_fp32  # of the layers' errors
    assert passed / calibrated.products == pytest.approx(passes)


def test_a_search_without_rounds_measures_its_start(config_folder: Path) -> None:
    none, one = (
        stage_of(forecast(config_folder, gpu="h100", order=f"newton:rounds={rounds}"), "newton: accept")
        for rounds in (0, 1)
    )
    assert none.work and one.work and none.work.products / one.work.products == pytest.approx(2 / 3.5)


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"order": "newton:rounds=0"}, None),
        ({"update": "admm", "train": "steps=2"}, "training"),
        ({"order": "ria", "update": "admm"}, "admm"),
    ],
)
def test_what_changes_weights_is_named(config_folder: Path, settings: dict[str, str], changes: str | None) -> None:
    assert forecast(config_folder, gpu="h100", **settings).changes == changes


def test_training_holds_hidden_states_where_few_positions_have_labels(
    config_folder: Path, tiny_vit: Path, tiny_whisper: Path
) -> None:
    def parts(model: Path) -> dict[str, int]:
        return bytes_of(forecast(model, train="steps=2"), "training")

    assert "dense model's outputs" not in parts(config_folder)
    for model in (tiny_vit, tiny_whisper):
        assert parts(model)["dense model's outputs"] > 0


def test_only_gradients_of_the_search_need_the_covariance_of_rows(tiny_vit: Path) -> None:
    found = forecast(tiny_vit, order="newton:rounds=1", train="steps=1")
    searched, trained = (stage_of(found, name).work for name in ("newton: gradients", "training"))
    assert searched and trained and searched.products_fp32 > 0
    assert trained.products_fp32 == 0 and searched.products > trained.products * 3 / 4  # without the dense model's pass


def test_training_holds_gradients_where_a_step_has_several_batches(config_folder: Path, tiny_vit: Path) -> None:
    """A step has 2 windows; 8 images are a window, in a step as in a batch."""
    for model in (config_folder, tiny_vit):
        for batch, held in ((1, True), (2, False)):
            found = forecast(model, train="steps=2", batch=batch)
            assert ("sums of gradients" in bytes_of(found, "training")) == held


def test_the_evaluation_counts_its_examples(tiny_vit: Path) -> None:
    found = forecast(tiny_vit, order="newton:rounds=1", samples=192)
    tried, evaluated, written = (stage_of(found, name).work for name in ("newton: accept", "evaluate", "write"))
    assert tried and evaluated and written  # 1.5 times and twice before, on 8 windows of 8 images
    passed = evaluated.products_fp32 - 2 * written.products_fp32  # of the layers' errors; 3 times on 24 windows of 32
    assert passed / (3 * 24 * 32) == pytest.approx(tried.products / ((1.5 + 2) * 8 * 8))


def test_a_time_limit_divides_into_search_and_training(config_folder: Path) -> None:
    def seconds(train: str, minutes: float | None) -> tuple[float, float | None]:
        settings = {"order": "newton:rounds=400", "train": train, "minutes": minutes}
        found = forecast(config_folder, gpu="h100", **settings).seconds
        searched = [own or 0.0 for name, own in found.items() if name in ("newton: gradients", "newton: accept")]
        return sum(searched), found.get("training")

    free, none = seconds("none", None)
    assert none is None
    limit = 1e-3 * free / 60
    short, trained = seconds("steps=1000000", limit)
    assert short < 60 * limit * 0.3 and trained == pytest.approx(60 * limit * 0.7)
    recipe = {"order": "none", "train": "steps=400:blocks=true"}
    free, after = (forecast(config_folder, gpu="h100", **recipe).seconds[name] for name in ("blocks", "training"))
    assert free and after
    for limit, expected in ((2 * free, free), (free / 2, free / 2)):
        trained = forecast(config_folder, gpu="h100", minutes=limit / 60, **recipe).seconds["training"]
        assert trained == pytest.approx(min(after, limit - expected), abs=1e-2 * free)


def test_only_the_config_is_read(config_folder: Path) -> None:
    found = forecast(config_folder, gpu="h100", effort="order")
    assert found.assumed == ("2 of the 5 blocks in model.layers were traced: the others equal one of them in shape",)
    half = json.loads((config_folder / "config.json").read_text())
    (config_folder / "config.json").write_text(json.dumps({**half, "dtype": "bfloat16"}))
    other = forecast(config_folder, gpu="h100", effort="order")
    assert 2 * other.disk["checkpoint"] == found.disk["checkpoint"]
    wide, narrow = (bytes_of(one, "newton: proposals") for one in (found, other))
    assert narrow["weights"] < 0.7 * wide["weights"] and 2 * narrow["gradients"] == wide["gradients"]
    assert narrow["second moments"] < 0.6 * wide["second moments"]


@pytest.mark.slow
def test_a_limit_is_kept_by_leaner_settings(config_folder: Path) -> None:
    config = PruneConfig(length=512, precision="fp32")
    free = permprune.forecast(str(config_folder), config)
    assert not free.advice
    least = permprune.forecast(str(config_folder), config.replace(batch=1, recompute=True))
    assert least.tensors < free.tensors
    for memory, options in (
        (free.tensors, ""),
        (free.tensors - 1, "--set batch"),
        (least.tensors, "--set batch=1 --set recompute=true"),
    ):
        found = permprune.forecast(str(config_folder), config.replace(memory=memory))
        assert found.tensors <= memory and options in found.advice and bool(found.advice) == bool(options)


def test_what_is_offloaded_keeps_the_windows_of_a_batch(config_folder: Path) -> None:
    run = partial(forecast, config_folder, gpu="h100", order="newton:rounds=1")
    found = run(memory=run(offload="host", recompute=True).device).config
    assert (found.offload, found.batch) == ("host", PruneConfig().batch)


def test_of_settings_that_offload_to_the_host_the_fastest_is_chosen(config_folder: Path) -> None:
    recipe = {"order": "ria", "update": "admm", "train": "steps=2000"}
    config = PruneConfig(offload="host", length=1024, batch=4, samples=4032, **recipe)
    given = permprune.forecast(str(config_folder), config, gpu="h100")
    chosen = permprune.forecast(str(config_folder), config.replace(memory=given.device), gpu="h100")
    assert chosen.config.recompute and not given.config.recompute
    assert sum(filter(None, chosen.seconds.values())) < sum(filter(None, given.seconds.values()))


def test_what_fits_nowhere_says_what_it_takes(config_folder: Path) -> None:
    with pytest.raises(
        PermpruneError, match=r"the model takes about .* GiB with --.*offload=disk: raise --memory to that$"
    ):
        forecast(config_folder, memory=2**10)
    least = {mode: forecast(config_folder, order="cp", offload="disk", mode=mode) for mode in ("fold", "gather")}
    assert least["gather"].tensors < least["fold"].tensors
    with pytest.raises(PermpruneError, match=r"raise --memory to that, or take --mode gather$"):
        forecast(config_folder, order="cp", memory=least["fold"].tensors - 1)


@pytest.mark.parametrize("length", [16, 47, 101])
def test_the_memory_that_a_message_asks_for_suffices(config_folder: Path, length: int) -> None:
    with pytest.raises(PermpruneError) as raised:
        forecast(config_folder, memory=2**10, length=length)
    (needed,) = re.findall(r"takes about ([\d.]+ GiB)", str(raised.value))
    assert forecast(config_folder, memory=parse_bytes(needed), length=length)


def test_a_run_that_fills_the_host_is_refused(config_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"offload": "host", "order": "newton:rounds=1"}
    needed = forecast(config_folder, **config)
    monkeypatch.setattr("permprune.forecasts.fitting.psutil.virtual_memory", lambda: Mock(total=needed.host - 1))
    with pytest.raises(PermpruneError, match=r"the host has .* takes .* of that: give --set offload=disk"):
        forecast(config_folder, **config, memory=needed.tensors)


def test_what_has_to_be_in_memory_is_not_offloaded(config_folder: Path, tiny_vit: Path) -> None:
    for folder, changes, reason in ((config_folder, {"pattern": "mixed"}, "a mix"), (tiny_vit, {}, "models of images")):
        for memory in (None, 2**40):
            with pytest.raises(PermpruneError, match=f"{reason} .* in memory: leave offload out"):
                forecast(folder, offload="disk", memory=memory, **changes)


def test_processes_divide_weights_that_do_not_fit(config_folder: Path) -> None:
    run = partial(forecast, config_folder, processes=2)
    whole = run(order="newton:rounds=1")
    assert (whole.processes, whole.shards, whole.advice) == (2, 1, "")
    parts = bytes_of(whole, "newton: proposals")
    forced = run(order="newton:rounds=1", shard=True)
    assert forced.shards == 2 and forced.advice == "the 2 processes divide the rows of the weights"
    divided = bytes_of(forced, "newton: proposals")
    for part in ("weights", "masks", "second moments", "gradients"):
        assert divided[part] == pytest.approx(parts[part] / 2, rel=0.01)
    least = forecast(config_folder, order="newton:rounds=1", batch=1, recompute=True).tensors
    found = run(order="newton:rounds=1", memory=least - 1)
    assert found.shards == 2 and found.tensors < least
    assert "in each process: the 2 processes divide the rows of the weights" in found.advice
    with pytest.raises(PermpruneError, match="raise --memory"):
        run(order="newton:rounds=1", memory=least - 1, shard=False)
    for settings, fault in (
        ({"order": "cp"}, "permuter cp needs all rows of a layer: choose one of none, random, ria"),
        ({"train": "steps=8"}, "an update and training need all rows of a layer: leave both out"),
        ({"update": "sparsegpt"}, "an update and training need all rows of a layer: leave both out"),
        ({"pattern": "mixed"}, "leave shard out"),
    ):
        with pytest.raises(PermpruneError, match=fault):
            run(**{"order": "newton:rounds=1", **settings}, shard=True)
    with pytest.raises(PermpruneError, match="one process has nothing to divide: start several with torchrun"):
        forecast(config_folder, order="newton:rounds=1", shard=True)


@pytest.mark.slow
def test_prune_takes_the_settings_of_its_forecast(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = PruneConfig(order="none", calibration=str(tiny_text), length=16, samples=24, precision="fp32")
    whole = permprune.forecast(str(tiny_checkpoint), config)
    limited = config.replace(memory=whole.tensors - 1)
    found = fit_memory(str(tiny_checkpoint), limited)
    assert found is not None and found.advice
    record = prune_to_folder(
        str(tiny_checkpoint), tmp_path / "out", limited, evaluation=Evaluation(str(tiny_text), 4, 16)
    )
    assert found.advice in caplog.text
    taken, names = record.to_json()["settings"], ("batch", "recompute", "offload")
    assert [taken[name] for name in names] == [getattr(found.config, name) for name in names]


@pytest.mark.slow
def test_prune_warns_where_the_memory_that_is_free_is_too_little(
    tiny_checkpoint: Path,
    tiny_text: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = PruneConfig(order="ria", calibration=str(tiny_text), length=16, samples=24, precision="fp32")
    needed, total = permprune.forecast(str(tiny_checkpoint), config).tensors, 2**40
    for available, told in ((needed + 1, False), (needed - 1, True)):
        caplog.clear()
        memory = Mock(total=total, available=available)
        monkeypatch.setattr("permprune.forecasts.fitting.psutil.virtual_memory", lambda memory=memory: memory)
        out = tmp_path / str(available)
        prune_to_folder(str(tiny_checkpoint), out, config, evaluation=Evaluation(str(tiny_text), 4, 16))
        assert (
            bool(re.search(r"which is too little: .* GiB with --set recompute=true .*would fit", caplog.text)) is told
        )


def test_a_config_with_millions_of_layers_is_refused(config_folder: Path) -> None:
    path = config_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 10**7}))
    with pytest.raises(PermpruneError, match="its config: num_hidden_layers is 10000000"):
        forecast(config_folder)


def test_time_follows_the_rates() -> None:
    machine = Machine("a machine", torch.device("cpu"), torch.float32, threads=2, sheet=Rates(4.0, 2.0, 8.0, 1.0))
    assert machine.seconds(Work(products=4, products_fp32=3)) == 2 * (1 + 1.5)
    assert machine.seconds(Work(comparisons=16, largest=0.25)) == 2 * 2 / 2
    assert machine.seconds(Work(comparisons=16, largest=0.75)) == 2 * 2 * 0.75
    assert machine.seconds(Work(stored=2e9, moved=3, carried=BUS)) == 2 + 2 * 3 + 1
    assert this_machine().rates.products > 0 and GPUS["h100"]().rates.products == 0.5 * 989.4e12


def test_what_travels_to_a_device_takes_time(config_folder: Path) -> None:
    recipe = {"order": "newton:rounds=2", "update": "admm", "train": "steps=2"}
    none, host, disk = (
        forecast(config_folder, gpu="h100", samples=192, offload=place, **recipe).seconds
        for place in ("none", "host", "disk")
    )
    for stage in ("calibrate", "newton: gradients", "update", "training", "evaluate"):
        assert (none[stage] or 0.0) < (host[stage] or 0.0) < (disk[stage] or 0.0)
    weights = 5 * (4 * 128**2 + 3 * 128 * 256)
    passes = (host["newton: accept"] - none["newton: accept"]) * BUS / (4 * weights)  # type: ignore[operator]
    assert passes == pytest.approx((1.5 * 2 + 2) * 2)  # 8 windows in fours


def test_what_rests_takes_what_is_left_of_the_device_and_the_host(config_folder: Path) -> None:
    recipe = {"order": "ria", "update": "admm", "train": "steps=2"}
    settings = {"gpu": "h100", "samples": 192, "batch": 1, "recompute": True, **recipe}
    host = forecast(config_folder, offload="host", **settings)
    assert host.device is not None
    memory, limit = 3 * host.device // 2, host.host - host.program + 10 * 2**20
    shared = forecast(config_folder, memory=memory, offload=f"host:{host.program + limit}B", **settings)
    assert host.device < shared.device <= memory and shared.host <= host.program + limit
    training = "training"
    assert (shared.seconds[training] or 0.0) < (host.seconds[training] or 0.0)
    resting = {stage.name: stage.bytes("disk") for stage in host.stages}
    assert resting[training] > shared.peak("disk").bytes("disk")
    settings |= {"order": "none", "length": 16}
    short = forecast(config_folder, memory=memory, offload="host", **settings)
    device, _, reserved = short.room  # the update of a block takes more than any other stage
    assert 0 < reserved < device
    for offload in ("disk:1GiB", "host:", "host:many"):
        with pytest.raises(PermpruneError, match="GiB"):
            PruneConfig(offload=offload)
    with pytest.raises(PermpruneError, match="disk"):
        forecast(config_folder, offload="host:1MB", **settings)


def test_the_counted_loss_keeps_what_the_objective_keeps() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, **SIZES)).to("meta").eval()

    def whole(model: torch.nn.Module) -> torch.Tensor:
        return Objective(divergence=0.0)(model, zeros(), next_token, None)[0]

    def zeros() -> Examples:
        return Examples({"input_ids": torch.zeros(64, 128, dtype=torch.int64)})

    counted = partial(count_activations, model, gradients="weights", dtype=torch.float32, recompute=True)
    one, other = counted(lambda model: next_token(model, zeros()).loss()), counted(whole)
    assert one.blocks + one.logits == pytest.approx(other.blocks + other.logits, rel=0.03)
    assert one.blocks + one.logits < 4 * 64 * 128 * 4096  # less than the logits alone


LARGE = {
    "llama-3.3-70b": (
        tf.LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=128256,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            dtype="bfloat16",
        ),
        70.6e9,
    ),
    "mixtral-8x7b": (
        tf.MixtralConfig(
            architectures=["MixtralForCausalLM"],
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            num_local_experts=8,
            dtype="bfloat16",
        ),
        46.7e9,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_models_are_forecast(name: str, tmp_path: Path) -> None:
    config, weights = LARGE[name]
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).num_hidden_layers == config.num_hidden_layers
    found = permprune.forecast(str(tmp_path), gpu="h100")
    assert found.disk["checkpoint"] == pytest.approx(2 * weights, rel=0.01)
    assert found.tensors > 4 * weights
    assert found.advice.startswith("NVIDIA H100 SXM has 80 GiB for tensors, which is too little: ")
    assert found.advice.endswith("GiB with --set recompute=true --set offload=host would fit")
