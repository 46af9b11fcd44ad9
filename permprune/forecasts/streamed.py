"""The memory and the disk space of a run that reads the model layer by layer."""

from __future__ import annotations

from torch import nn

from permprune.config import PruneConfig
from permprune.evaluation.size import weight_bytes
from permprune.forecasts.passes import example_pass
from permprune.forecasts.resources import Memory, Stage, Work
from permprune.forecasts.run import EVALUATED, Forecast, Subject, offloaded_bytes, program_bytes
from permprune.models.modality import EVALUATION_BATCH
from permprune.models.positions import fitting_length
from permprune.permuters.registry import permuter
from permprune.pruning.problem import Outline
from permprune.saliency.base import Saliency
from permprune.saliency.obs import OBS
from permprune.saliency.registry import saliency


def streamed_bytes(model: nn.Module, outline: Outline, *, metric: Saliency, tokens: int, length: int) -> int:
    """Estimate the peak bytes of memory of a run that reads the model layer by layer.

    The estimate is the largest of three: the search on the layers that read one tensor, which needs up to 56 bytes per
    weight, the second moments and what is computed from them (OBS inverts them), and the tensor itself, of this number
    of `tokens`; the forward pass of these layers; and the forward pass of a part of the model that is not pruned, such
    as the head, with its outputs for windows of `length` tokens. All experts of a layer are read together, and each may
    run on all tokens. The tables of `cp`, about 20 MB for up to 2048 channels, are not counted.
    """
    needed, square = 0, 32 if isinstance(metric, OBS) else 12
    for layers in outline.layers_by_input().values():
        rows, channels = sum(len(layer.weight) for layer in layers), layers[0].weight.shape[1]
        experts = {layer.owner for layer in layers if layer.expert is not None}
        beside = sum(4 * p.numel() + 8 * tokens * p.shape[-1] for owner in experts for p in owner.parameters())
        search = 56 * rows * channels + square * channels**2 + 12 * tokens * channels
        needed = max(needed, beside + search, beside + 4 * rows * channels + 12 * tokens * (rows + channels))
    pruned = {layer.parameter for layer in outline.layers}
    others = [parameter for name, parameter in model.named_parameters() if name not in pruned]
    outputs = EVALUATION_BATCH * length
    return max(needed, *(6 * (p.numel() + outputs * p.shape[:1].numel()) for p in others))


def forecast_streamed(subject: Subject, config: PruneConfig) -> Forecast:
    """Forecast a run that reads the model layer by layer; the time of its search is not known."""
    model, outline, windows, processes = subject.model, subject.outline, subject.windows, subject.processes
    length, checkpoint = fitting_length(model, config.length), weight_bytes(model, subject.stored)
    tokens = config.shares(config.samples)[0] * length
    needed = streamed_bytes(model, outline, metric=saliency(config.saliency), tokens=tokens, length=length)
    example = example_pass(model, config, lists=outline.repeated)
    largest, forward = Memory("largest part of the model", needed), example.operations / length
    batches = -(-windows // EVALUATION_BATCH)
    evaluating = Work(products_fp32=windows * length * forward, stored=batches * checkpoint) * EVALUATED
    return Forecast(
        config=config,
        machine=subject.machine,
        stages=(
            Stage("calibrate", (largest,), Work(products=tokens * forward, stored=checkpoint)),
            Stage(f"{permuter(config.permute).name}, layer by layer", (largest,), None),
            Stage("evaluate", (largest,), evaluating),
            Stage("write", (largest,), Work(stored=2 * checkpoint)),
        ),
        disk={
            "checkpoint": checkpoint,
            "masks": processes * (outline.weights // 4),  # in both orders, one bit for each weight
            "experts as fused": processes * offloaded_bytes(outline, subject.stored),
        },
        program=program_bytes(),
        streamed=True,
        processes=processes,
    )
