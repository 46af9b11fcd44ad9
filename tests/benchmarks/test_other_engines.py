"""Dense models in other engines, as a benchmark runs them."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from permprune.evaluation.speed import batch_inputs

OTHER = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "other_engines.py"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tolerance"), [("ONNX Runtime fp32", 1e-5), ("ONNX Runtime int8", 5e-2)])
def test_an_engine_computes_what_the_model_does(name: str, tolerance: float, tiny_bert: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert).eval()
    engine = OTHER["build"](model, name, batch_inputs(model, 2, 8), threads=1, folder=tmp_path)
    words = batch_inputs(model, 3, 12)["input_ids"]
    with torch.no_grad():
        expected = model(words).logits.numpy()
    assert np.abs(engine.run(words)[0] - expected).max() < tolerance
    found = engine.measure(model, 5, 4)
    assert (found.batch, found.context) == (5, 4)
    if name.endswith("fp32"):
        assert engine.nbytes > sum(parameter.nbytes for parameter in model.parameters())


def test_models_that_write_text_are_refused(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(OTHER["EngineError"], match="write no text"):
        OTHER["build"](tiny_llama, "OpenVINO fp32", batch_inputs(tiny_llama, 2, 8), threads=1, folder=tmp_path)
