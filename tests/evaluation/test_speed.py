"""Speeds: what is run for them, and what follows from the times."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from permprune.checkpoints.benchmark import BenchedModel, Benchmark, Speed, Throughput
from permprune.checkpoints.schema import Malformed, decode
from permprune.evaluation.speed import batch_inputs, cells, measure_speed
from permprune.kv.cache import PrunedCache
from permprune.report.speed import bench_table, summary

from .. import modalities


def test_a_prompt_is_read_once_and_tokens_follow_one_by_one(tiny_llama: LlamaForCausalLM) -> None:
    shapes: list[tuple[int, ...]] = []
    tiny_llama.model.embed_tokens.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    speed = measure_speed(tiny_llama.train(), batch=3, context=20, steps=4)
    assert all(module.training for module in tiny_llama.modules())
    assert shapes == [(3, 20)] + [(3, 1)] * 4
    assert (speed.batch, speed.context) == (3, 20) and speed.first_token > 0 and speed.next_token > 0


def test_tokens_are_those_of_greedy_generation(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    argmax = torch.Tensor.argmax

    def keep(self: torch.Tensor, *args: int) -> torch.Tensor:
        token = argmax(self, *args)
        found.append(int(token))
        return token

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "argmax", keep)
        measure_speed(tiny_llama, batch=1, context=9, steps=5)
    prompt = torch.randint(128, (1, 9), generator=torch.Generator().manual_seed(0))
    expected = tiny_llama.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert found == expected[0, 9:].tolist()


def test_a_cache_of_ones_own_is_filled_and_its_bytes_are_counted(tiny_llama: LlamaForCausalLM) -> None:
    caches: list[DynamicCache] = []

    def make() -> DynamicCache:
        caches.append(DynamicCache(config=tiny_llama.config))
        return caches[-1]

    speed = measure_speed(tiny_llama, batch=2, context=20, steps=4, cache=make)
    assert len(caches) == 1 and caches[0].get_seq_length() == 24
    own = 2 * 24 * 2 * 8 * 4  # rows, tokens, heads, channels, bytes
    assert speed.cache == 2 * 2 * own == measure_speed(tiny_llama, batch=2, context=20, steps=4).cache
    pruned = measure_speed(tiny_llama, batch=2, context=60, steps=4, cache=lambda: PrunedCache(tiny_llama))
    assert 0 < pruned.cache < measure_speed(tiny_llama, batch=2, context=60, steps=4).cache


def test_a_prompt_and_what_follows_fit_into_the_positions(tiny_llama: LlamaForCausalLM) -> None:
    assert cells(tiny_llama, [2], [2048, 100, 128], 28) == [(2, 100)]
    assert cells(tiny_llama, [2], [2048], 500) == [(2, 1)]
    assert cells(tiny_llama, [2]) == [(2, 112)]


@pytest.mark.parametrize(
    ("name", "contexts", "passes"),
    [("vit", [0], [5]), ("bert", [16, 32], [5]), ("whisper", [0], [5] * 3)],
)
def test_other_models_read_a_batch_and_speech_is_transcribed(name: str, contexts: list[int], passes: list[int]) -> None:
    model = modalities.make(name)
    assert cells(model, [1, 5], [16, 9000, 9001]) == [(batch, context) for context in contexts for batch in (1, 5)]
    assert len(cells(model)) == 4
    sizes: list[int] = []
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    speed = measure_speed(model, batch=5, context=contexts[0], steps=3)
    assert isinstance(speed, Throughput) and speed.rate > 0
    assert (speed.batch, speed.context, sizes) == (5, contexts[0], passes)


def test_images_have_the_size_that_the_processor_gives() -> None:
    model = modalities.make("vit")
    own = batch_inputs(model, 3, 0)["pixel_values"].shape
    assert batch_inputs(model, 3, 0, (8, 24))["pixel_values"].shape == (*own[:2], 8, 24)
    with pytest.raises(ValueError, match="24"):  # this model reads images of one size
        measure_speed(model, batch=3, context=0, size=(8, 24))


def test_speeds_of_inputs_are_shown_and_survive_json() -> None:
    rows = [
        BenchedModel(name, name == "a", size, 9, [Throughput(1, 0, seconds), Throughput(8, 0, 4 * seconds)])
        for name, size, seconds in (("a", 200, 0.4), ("out/b", 100, 0.2))
    ]
    figures = Benchmark(1, "CPU", rows).to_json()
    assert decode(Benchmark, figures) == Benchmark(1, "CPU", rows)
    assert "2.00 at batch 1; 2.00 at batch 8" in summary(figures, figures["rows"][1])
    assert figures["rows"][1]["speeds"][1]["items"] == 10
    table = bench_table(figures)
    assert table.row_count == 4 and table.title == "1 thread of the CPU"
    with pytest.raises(Malformed):
        Benchmark(1, "CPU", [rows[0], BenchedModel("b", False, 1, 9, [Speed(1, 0, 1, 1), Speed(8, 0, 1, 1)])])


def benchmark() -> Benchmark:
    dense = [
        BenchedModel("llama (fp32)", True, 400, 9, [Speed(1, 128, 0.5, 0.1), Speed(8, 128, 4.0, 0.2)]),
        BenchedModel("llama (bf16)", True, 200, 9, [Speed(1, 128, 0.4, 0.08), Speed(8, 128, 4.0, 0.4)]),
    ]
    packed = BenchedModel("out/packed", False, 120, 9, [Speed(1, 128, 0.5, 0.05), Speed(8, 128, 4.0, 0.1)])
    return Benchmark(2, "CPU", [*dense, packed])


def test_a_model_with_a_pruned_cache_is_named_and_its_cache_compared() -> None:
    cached = BenchedModel("out/packed with out/kv", False, 120, 9, [Speed(1, 128, 0.5, 0.05, 6)])
    dense = [
        BenchedModel(name, True, 200, 9, [Speed(1, 128, 0.4, 0.08, size)]) for name, size in (("a", 20), ("b", 10))
    ]
    figures = Benchmark(2, "CPU", [*dense, cached]).to_json()
    assert "0.60 of the size of the smallest dense model, with 0.60 of its cache; " in summary(
        figures, figures["rows"][2]
    )
    assert "its cache" not in summary(figures, figures["rows"][1])


def test_a_summary_is_beside_the_best_dense_model_of_each_figure() -> None:
    figures = benchmark().to_json()
    text = summary(figures, figures["rows"][2])
    assert text.startswith("0.60 of the size of the smallest dense model")
    assert "1.60 at batch 1, context 128; 2.00 at batch 8, context 128" in text
    assert figures["rows"][2]["speeds"][1]["decode"] == 80 and figures["rows"][0]["speeds"][0]["prefill"] == 256


def test_the_table_has_every_measurement_of_every_model() -> None:
    assert bench_table(benchmark().to_json()).row_count == 6


def test_figures_survive_json_and_broken_ones_are_malformed() -> None:
    figures = benchmark().to_json()
    assert decode(Benchmark, figures) == benchmark()
    for change in ({"rows": figures["rows"][2:]}, {"rows": []}, {"threads": 0}, {"device": 3}):
        with pytest.raises(Malformed):
            decode(Benchmark, {**figures, **change})
    figures["rows"][0]["speeds"][0]["next_token"] = 0.0
    with pytest.raises(Malformed, match="next_token"):
        decode(Benchmark, figures)
