"""Pruned models leave PyTorch as ONNX, with the same outputs and their zeros in groups."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

import permprune
from permprune.checkpoints.origin import held_patterns
from permprune.models.layers import block_linears

from ..faults.pruned import WINDOWS
from ..modalities import make

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # of the exporter
PIXELS = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Logits(nn.Module):
    def __init__(self, model: PreTrainedModel, argument: str) -> None:
        super().__init__()
        self.model, self.argument = model, argument

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(**{self.argument: x}).logits


def exported(model: PreTrainedModel, inputs: torch.Tensor, path: Path) -> onnx.ModelProto:
    """Export the model, check its outputs in ONNX Runtime, and return the graph."""
    model.config.use_cache = False
    argument = model.main_input_name
    sizes: dict[int, Any] = {0: torch.export.Dim("batch")}
    torch.onnx.export(Logits(model, argument), (inputs[:2],), dynamo=True, dynamic_shapes=(sizes,)).save(path)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs[:5].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(**{argument: inputs[:5]}).logits, rtol=1e-4, atol=1e-5)
    return onnx.load(path)


def pruned_matrices(graph: onnx.ModelProto) -> list[np.ndarray]:
    """The weights with zeros, as (inputs, outputs)."""
    matrices = map(onnx.numpy_helper.to_array, graph.graph.initializer)
    return [matrix for matrix in matrices if matrix.ndim == 2 and (matrix == 0).mean() > 0.4]


def hold_the_pattern(model: PreTrainedModel, graph: onnx.ModelProto) -> bool:
    """Whether every pruned layer of the model is 2:4 along the first axis of its matrix in the graph."""
    weights = pruned_matrices(graph)
    assert len(weights) == len(block_linears(model))
    return all(((weight.T.reshape(-1, 4) != 0).sum(1) <= 2).all() for weight in weights)


def test_a_language_model_with_gathers(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = permprune.prune(tiny_llama, order="random", mode="gather", examples=WINDOWS).model.eval()
    assert hold_the_pattern(model, exported(model, WINDOWS, tmp_path / "model.onnx"))


def test_an_image_model(tmp_path: Path) -> None:
    model = permprune.prune(make("vit"), order="random", examples={"pixel_values": PIXELS}).model.eval()
    assert hold_the_pattern(model, exported(model, PIXELS, tmp_path / "model.onnx"))


def test_a_packed_model_is_refused_unless_it_is_unpacked(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = permprune.prune(tiny_llama, order="random", examples=WINDOWS).model.eval()
    permprune.pack(model, held_patterns(model), dtype="fp32")
    with pytest.raises(torch.onnx.OnnxExporterError, match="packed layers have no ONNX form"):
        torch.onnx.export(Logits(model, "input_ids"), (WINDOWS[:2],), dynamo=True)
    permprune.unpack(model)
    assert hold_the_pattern(model, exported(model, WINDOWS, tmp_path / "model.onnx"))
