"""A new saliency is one small class: its scores choose the weights that a pruned model keeps."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from permprune import PermpruneError, Saliency, prune
from permprune.options import NonNegative

WINDOWS = torch.randint(128, (12, 16), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Later(Saliency):
    """Weights of later channels count more."""

    name: ClassVar[str] = "later"
    power: NonNegative = 30.0

    def scale(self, weight: Tensor, moments: Tensor) -> Tensor:
        return torch.linspace(0.5, 1, weight.shape[1], device=weight.device) ** self.power


def test_a_new_saliency_chooses_the_weights(tiny_llama: LlamaForCausalLM) -> None:
    pruned = prune(tiny_llama, order="none", saliency=Later(), examples=WINDOWS, precision="fp32")
    assert pruned.record().settings["saliency"] == "later"
    weight = pruned.model.get_submodule(pruned.layers[0].name).weight.unflatten(1, (-1, 4)).ne(0)
    assert weight[:, :, 2:].sum() > weight[:, :, :2].sum() > 0
    with pytest.raises(PermpruneError, match="power is -1"):
        Later(power=-1)
