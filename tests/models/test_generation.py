"""Speech without transcripts: the dense model's own are imitated."""

from pathlib import Path
from typing import NoReturn

import pytest
import torch

from permprune.config import PruneConfig
from permprune.engine.held import prepare
from permprune.examples import Examples
from permprune.forecasts.forecast import Forecast
from permprune.forecasts.run import forecast_plan
from permprune.losses.targets import Imitation, choose_task
from permprune.models.generation import needs_decoder_inputs, with_decoder_inputs

from ..modalities import images, make, speech


def silent() -> Examples:
    return Examples({"input_features": speech()["input_features"]})


def test_only_speech_without_text_lacks_it() -> None:
    assert needs_decoder_inputs(make("whisper"), silent())
    assert not needs_decoder_inputs(make("whisper"), speech())
    assert not needs_decoder_inputs(make("vit"), images(labels=False))


@pytest.mark.parametrize("several", [False, True])
def test_texts_start_as_the_decoder_does_and_end_where_it_ends(several: bool) -> None:
    model = make("whisper")
    model.generation_config.eos_token_id = None
    endless = with_decoder_inputs(model, silent())
    free = endless["decoder_input_ids"]
    assert (free[:, 0] == 1).all() and free.shape[1] <= 16 and endless["decoder_attention_mask"].all()
    ends = [int(free[0, 4]), int(free[1, 6])] if several else [int(free[0, 4])]
    model.generation_config.eos_token_id = ends if several else ends[0]
    found = with_decoder_inputs(model, silent())
    ids, mask = found["decoder_input_ids"], found["decoder_attention_mask"]
    few = with_decoder_inputs(model, silent()[:5])["decoder_input_ids"]  # in other batches
    assert torch.equal(few, ids[:5, : few.shape[1]])
    for own, real in zip(ids[:, 1:].tolist(), mask[:, 1:].tolist(), strict=True):
        end = next((place for place, token in enumerate(own) if token in ends), len(own))
        assert real == [1] * end + [0] * (len(own) - end)
    assert 0 < int(mask[0].sum()) <= 4


def test_a_speech_model_is_calibrated_without_labels() -> None:
    model = make("whisper")
    found = with_decoder_inputs(model, silent())
    said = choose_task(model, found, 4)(model, found)
    assert said.terms == int(found["decoder_attention_mask"].sum())
    prepared = prepare(make("whisper"), None, PruneConfig(precision="fp32", measured=4, held_out=2), examples=silent())
    assert prepared.network.task == Imitation()
    assert torch.equal(prepared.measured["decoder_input_ids"], found["decoder_input_ids"][:4])
    assert all(fisher.any() for fisher in prepared.network.statistics.fisher.values())


def test_texts_are_forecast_before_they_are_generated_and_kept_for_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("generated")

    config, shown = PruneConfig(precision="fp32", measured=4, held_out=2), {"examples": silent(), "partial": tmp_path}
    forecasts: list[Forecast] = []
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="generated"):
        patch.setattr("permprune.models.generation.generate", fail)
        prepare(
            model := make("whisper"),
            None,
            config,
            planned=lambda p: forecasts.append(forecast_plan(model, p, 1)),
            **shown,
        )
    (forecast,) = forecasts
    assert forecast.seconds["transcribe"]
    first = prepare(make("whisper"), None, config, **shown)
    monkeypatch.setattr("permprune.models.generation.generate", fail)
    again = prepare(make("whisper"), None, config, **shown)
    for one, other in zip((first.measured, first.run.train), (again.measured, again.run.train), strict=True):
        assert torch.equal(one["decoder_input_ids"], other["decoder_input_ids"])
