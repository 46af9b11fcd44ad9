"""What a model returns beside its logits keeps its order, or is named."""

import copy
import re

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from permprune.coupling.discovery import discover
from permprune.coupling.fold import fold_all
from permprune.models.forward import side_outputs

from .coupling_models import FAMILIES, IMAGE, Example, Family, noise, pixels, randomised
from .supported import movable, outputs, random_tables


def yolos() -> nn.Module:
    config = {**IMAGE, "image_size": [16, 16], "num_detection_tokens": 3, "use_mid_position_embeddings": False}
    return tf.YolosForObjectDetection(tf.YolosConfig(**config))


def speaker_encoder() -> nn.Module:
    return tf.Wav2Vec2ForXVector(
        tf.Wav2Vec2Config(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, conv_dim=[16, 16],
            conv_kernel=[10, 3], conv_stride=[5, 2], num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
            tdnn_dim=[16, 16], tdnn_kernel=[3, 1], tdnn_dilation=[1, 1], xvector_output_dim=16, num_labels=5,
        )
    )  # fmt: skip


CASES = {
    # of each: the family, and the outputs beside the logits that come out in a new order
    "yolos": (Family(yolos, pixels), "last_hidden_state"),
    "t5": (FAMILIES["t5"], "encoder_last_hidden_state"),
    "llava": (FAMILIES["llava"], r"image_\w+(\.\w+)?"),  # which depends on the release of Transformers
    "whisper": (FAMILIES["whisper"], "encoder_last_hidden_state"),
    "speaker encoder": (Family(speaker_encoder, lambda: {"input_values": noise(2, 400)}), ""),
    "bert": (FAMILIES["bert"], ""),  # it returns no logits, so that all that it returns keeps its order
}


@torch.no_grad()
def others(model: nn.Module, example: Example) -> list[tuple[str, Tensor]]:
    return [(name, leaf) for name, leaf in side_outputs(model(**example)) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("case", CASES)
def test_other_outputs_keep_their_order_or_are_named(case: str) -> None:
    family, expected = CASES[case]
    model, example = randomised(family.build()), family.example()
    coupling = discover(model, example)
    tables = random_tables(coupling)
    permuted = copy.deepcopy(model)
    fold_all(permuted, tables, coupling)
    for old, new in zip(outputs(model, example), outputs(permuted, example), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)
    reordered = coupling.reordered(space.name for space in movable(coupling))
    assert bool(reordered) == bool(expected) and all(re.fullmatch(expected, name) for name in reordered)
    assert all(name.endswith("residual") or ".residual" in name for spaces in reordered.values() for name in spaces)
    for (name, old), (_, new) in zip(others(model, example), others(permuted, example), strict=True):
        if spaces := reordered.get(name):
            old = old[..., tables[spaces[0]][0]]
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)


def test_an_embedding_beside_the_logits_is_frozen() -> None:
    coupling = discover(randomised(speaker_encoder()), {"input_values": noise(2, 400)})
    reasons = [space.reason for space in coupling.spaces if space.freedom == "frozen"]
    assert "the model returns it as embeddings" in reasons
