"""Dense models in the engines that people serve them with, to measure packed ones beside them.

PyTorch exports the model to ONNX. ONNX Runtime's int8 is its dynamic quantization; OpenVINO's is the static one of
NNCF, calibrated on random inputs, so that only its speed means something.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from permprune.checkpoints.benchmark import Throughput
from permprune.errors import PermpruneError, first_line
from permprune.evaluation.speed import ImageSize, batch_inputs
from permprune.examples import Examples
from permprune.models.forward import is_causal_lm
from permprune.models.generation import needs_decoder_inputs

ENGINES = ("ONNX Runtime fp32", "ONNX Runtime int8", "OpenVINO fp32", "OpenVINO bf16", "OpenVINO int8")
"""The engines and their types."""


class EngineError(PermpruneError):
    """An engine that does not run a model."""


@dataclass(frozen=True)
class Engine:
    """A model in an engine: `run` computes it for its input, a tensor; `nbytes` are those of its files."""

    run: Callable[[Tensor], Any]
    nbytes: int

    def measure(self, model: PreTrainedModel, batch: int, context: int, size: ImageSize = None) -> Throughput:
        """Measure the time for the inputs of `evaluation.speed.measure_speed`, once; `model` is the one it runs.

        Raises `EngineError` if the engine fails.
        """
        inputs = batch_inputs(model, batch, context, size)
        (given,) = (inputs[name] for name in inputs)
        began = time.perf_counter()
        try:
            self.run(given)
        except Exception as error:  # the engines raise any type
            raise EngineError(f"an engine fails on a batch of {batch}: {first_line(error)}") from error
        return Throughput(batch, context, time.perf_counter() - began)


def build(model: PreTrainedModel, name: str, inputs: Examples, *, threads: int, folder: Path) -> Engine:
    """Make a dense fp32 model run in an engine, one of `ENGINES`, with so many threads of the CPU.

    `inputs` are an example of its inputs, of which there must be one. Files are written to the folder. Raises
    `EngineError` if the model writes text or takes several inputs, or if the engine does not take it.
    """
    argument, *others = inputs
    if is_causal_lm(model) or needs_decoder_inputs(model, inputs) or others:
        raise EngineError(
            f"{name} is measured with models that read one tensor and write no text, which this one is not"
        )
    make = _onnx_runtime if name.startswith("ONNX") else _openvino
    try:
        exported = _exported(model, argument, inputs[argument], folder)
        return make(exported, name.rpartition(" ")[2], inputs[argument], threads)
    except Exception as error:  # the exporter and the engines raise any type
        raise EngineError(f"{name} does not run this model: {first_line(error)}") from error


class _FirstOutput(nn.Module):
    def __init__(self, model: nn.Module, argument: str) -> None:
        super().__init__()
        self.model, self.argument = model, argument

    def forward(self, given: Tensor) -> Tensor:
        outputs: Tensor = self.model(**{self.argument: given})[0]
        return outputs


def _exported(model: nn.Module, argument: str, example: Tensor, folder: Path) -> Path:
    """Write the model as ONNX for batches of any size, and texts of any length; returns the file."""
    dynamic = range(1 if example.is_floating_point() else 2)
    sizes = ({dim: torch.export.Dim.AUTO for dim in dynamic},)
    module = _FirstOutput(model, argument).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(module, (example,), dynamo=True, dynamic_shapes=sizes, verbose=False)
    assert program is not None
    program.save(folder / "model.onnx")
    return folder / "model.onnx"


def _onnx_runtime(path: Path, dtype: str, _example: Tensor, threads: int) -> Engine:
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    if dtype == "int8":
        dense, path = path, path.with_name("int8.onnx")
        quantize_dynamic(dense, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return Engine(lambda x: session.run(None, {given.name: x.numpy()}), _size(path))


def _openvino(path: Path, dtype: str, example: Tensor, threads: int) -> Engine:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    if dtype == "int8":
        import nncf

        model = nncf.quantize(model, nncf.Dataset([example.numpy()]), model_type=nncf.ModelType.TRANSFORMER)
    stored = path.with_name("openvino.xml")
    openvino.save_model(model, stored, compress_to_fp16=dtype == "bf16")  # of as many bytes as bf16
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bf16" else "f32"}
    compiled = core.compile_model(model, "CPU", settings)
    return Engine(lambda x: compiled(x.numpy()), _size(stored))


def _size(path: Path) -> int:
    """The bytes of a model's file and of those beside it that hold its weights."""
    return sum(file.stat().st_size for file in path.parent.iterdir() if file.name.split(".")[0] == path.stem)
