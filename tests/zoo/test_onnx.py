"""The tiny files are exported as the real ones were, and bear the names that these have."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from transformers import (
    AutoImageProcessor,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from permprune.errors import PermpruneError
from permprune.zoo.onnx import convert_clip, convert_dinov2

OLD_NAMES = {"q_proj": "attention/query", "k_proj": "attention/key", "v_proj": "attention/value"}


def _randomise(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model.eval()


def _export(model: torch.nn.Module, size: int, file) -> onnx.ModelProto:
    with pytest.warns((DeprecationWarning, torch.jit.TracerWarning)):
        torch.onnx.export(model, (torch.zeros(1, 3, size, size),), file, dynamo=False, opset_version=14)
    return onnx.load(file)


@pytest.fixture
def dinov2(tmp_path):
    """A tiny backbone, and the file of a network on it."""
    config = Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, patch_size=4, image_size=24)
    backbone = _randomise(Dinov2Model(config))

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = backbone
            self.decoder = torch.nn.Linear(64, 3)

        def forward(self, pixels):
            return self.decoder(self.backbone(pixels).last_hidden_state)

    file = tmp_path / "network.onnx"
    graph = _export(Network(), 16, file)
    for node in graph.graph.node:
        for new, old in OLD_NAMES.items():
            node.name = node.name.replace(f"/attention/{new}/", f"/attention/{old}/")
        node.name = node.name.replace("/attention/o_proj/", "/attention/output/dense/")
    for tensor in graph.graph.initializer:
        for new, old in OLD_NAMES.items():
            tensor.name = tensor.name.replace(f".attention.{new}.", f".attention.{old.replace('/', '.')}.")
        tensor.name = tensor.name.replace(".attention.o_proj.", ".attention.output.dense.")
    onnx.save(graph, file)
    return backbone, file


def _quantise(graph: onnx.GraphProto, model: torch.nn.Module) -> None:
    """Round the weights of the linear layers to 8-bit grids, in the model and, with dynamic quantisation, the graph."""
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in arrays:
            nodes.append(node)
            continue
        pixels, name = node.input
        weight = numpy_helper.to_array(arrays[name])
        zero = np.arange(weight.shape[1], dtype=np.int8) - 5
        scale = (np.abs(weight).max(axis=0) / 100).astype(np.float32)
        levels = (np.rint(weight / scale) + zero).astype(np.int8)
        for suffix, array in {"quantized": levels, "zero_point": zero, "scale": scale}.items():
            graph.initializer.append(numpy_helper.from_array(array, f"{name}_{suffix}"))
        graph.initializer.remove(arrays[name])
        linear = model.get_submodule(node.name.removesuffix("/MatMul").strip("/").replace("/", "."))
        linear.weight.data = torch.from_numpy(((levels.astype(np.float32) - zero) * scale).T.copy())
        stem = f"{node.name}_quant"
        quantised = [f"{pixels}_{part}_{len(nodes)}" for part in ("quantized", "scale", "zero_point")]
        nodes += [
            helper.make_node("DynamicQuantizeLinear", [pixels], quantised, name=f"{stem}_linear"),
            helper.make_node("Mul", [quantised[1], f"{name}_scale"], [f"{stem}:0"], name=f"{stem}_scales_mul"),
            helper.make_node(
                "MatMulInteger",
                [quantised[0], f"{name}_quantized", quantised[2], f"{name}_zero_point"],
                [f"{stem}:1"],
                name=stem,
            ),
            helper.make_node("Cast", [f"{stem}:1"], [f"{stem}:2"], name=f"{stem}_cast", to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [f"{stem}:2", f"{stem}:0"], list(node.output), name=f"{stem}_output_scale_mul"),
        ]
    del graph.node[:]
    graph.node.extend(nodes)


@pytest.fixture
def clip(tmp_path):
    """A tiny image tower on 8-bit grids, and its file."""
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        patch_size=8,
        image_size=24,
        projection_dim=16,
    )
    model = _randomise(CLIPVisionModelWithProjection(config))
    file = tmp_path / "tower.onnx"
    graph = _export(model, 24, file)
    _quantise(graph.graph, model)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, file)
    return model, file


@torch.no_grad()
def test_dinov2(dinov2, tmp_path):
    backbone, file = dinov2
    convert_dinov2([file], tmp_path)
    converted = AutoModel.from_pretrained(tmp_path)
    assert type(converted) is Dinov2Model
    for size in (16, 24):
        pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(converted(pixels).last_hidden_state, backbone(pixels).last_hidden_state)


@torch.no_grad()
def test_clip(clip, tmp_path):
    model, file = clip
    convert_clip([file], tmp_path)
    converted = CLIPVisionModelWithProjection.from_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(converted(pixels).image_embeds, model(pixels).image_embeds)
    assert AutoModel.from_pretrained(tmp_path).config.model_type == "clip_vision_model"


@pytest.mark.parametrize(
    ("model", "convert", "mean", "size"),
    [("dinov2", convert_dinov2, 0.485, 224), ("clip", convert_clip, 0.48145466, 24)],
)
def test_processor(model, convert, mean, size, request, tmp_path):
    _, file = request.getfixturevalue(model)
    convert([file], tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    image = np.full((30, 40, 3), 255, dtype=np.uint8)
    image[:, :2] = image[:, -2:] = 0  # beyond the centre
    pixels = processor(images=[image], return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, size, size)
    std = processor.image_std[0]
    torch.testing.assert_close(pixels[0, 0], torch.full((size, size), (1 - mean) / std), atol=1e-4, rtol=0)


def test_a_release_of_transformers_with_other_weights(clip, tmp_path):
    _, file = clip
    graph = onnx.load(file)
    graph.graph.initializer.append(numpy_helper.from_array(np.zeros(3, dtype=np.float32), "vision_model.other.bias"))
    onnx.save(graph, file)
    with pytest.raises(PermpruneError, match=r"different weights \(vision_model.other.bias\)"):
        convert_clip([file], tmp_path)
