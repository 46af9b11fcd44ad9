"""Tiny mixtures of experts, and text that they predict better than chance."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .coupling.coupling_models import deepseek_v3, gpt_oss, mixtral, qwen3_moe, randomised

FAMILIES = {"mixtral": mixtral, "qwen3-moe": qwen3_moe, "gpt-oss": gpt_oss, "deepseek-v3": deepseek_v3}


def make(family: str) -> PreTrainedModel:
    """A random model in fp32, with weights large enough for its experts and its predictions to differ."""
    model: PreTrainedModel = randomised(FAMILIES[family]()).float()  # type: ignore[assignment]
    with torch.no_grad():
        model.lm_head.weight *= 4
    return model


@cache
def written_by(family: str, count: int = 64, length: int = 12) -> Tensor:
    """Token ids (count, length) drawn from the model's own predictions."""
    model, generator = make(family), torch.Generator().manual_seed(0)
    ids = torch.randint(60, (count, 1), generator=generator)
    with torch.no_grad():
        for _ in range(length - 1):
            last = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(last, 1, generator=generator)], 1)
    return ids
