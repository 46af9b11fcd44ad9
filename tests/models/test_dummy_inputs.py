"""Example batches that are made up, and ones that are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from permprune.coupling.discovery import discover
from permprune.errors import PermpruneError
from permprune.models.dummy_inputs import example_inputs, random_like

from ..coupling.coupling_models import idefics3, llava_onevision, qwen2_5_vl

TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 2,
}  # fmt: skip
IMAGE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
TWO_SIDES: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "max_target_positions": 20,
}  # fmt: skip
WAVE: dict[str, Any] = {
    **{key: TEXT[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
    "vocab_size": 32, "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2],
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
GPT2 = tf.GPT2Config(
    vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
)  # fmt: skip


def clip() -> nn.Module:
    text, vision = {**TEXT, "projection_dim": 16, "max_position_embeddings": 20}, {**IMAGE, "projection_dim": 16}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def joined(kind: str, encoder: tf.PreTrainedConfig) -> nn.Module:
    config: tf.PreTrainedConfig = getattr(tf, f"{kind}Config").from_encoder_decoder_configs(encoder, GPT2)
    model: nn.Module = getattr(tf, f"{kind}Model")(config)
    return model


def llava() -> nn.Module:
    vision = tf.CLIPVisionConfig(**{**IMAGE, "num_hidden_layers": 2})
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**TEXT), image_token_index=63)
    )


IDS, PIXELS = (2, 11), (2, 3, 16, 16)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "text": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)), {"input_ids": IDS}),
    "text to text": (
        lambda: tf.BartForSequenceClassification(tf.BartConfig(**TWO_SIDES, max_position_embeddings=20)),
        {"input_ids": IDS, "decoder_input_ids": IDS},
    ),
    "encoder of two sides": (
        lambda: tf.T5EncoderModel(tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)),
        {"input_ids": IDS},
    ),
    "image": (
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**{**IMAGE, "image_size": (16, 8), "num_channels": 1})),
        {"pixel_values": (2, 1, 16, 8)},
    ),
    "video": (
        lambda: tf.VideoMAEForVideoClassification(tf.VideoMAEConfig(**IMAGE, num_frames=4)),
        {"pixel_values": (2, 4, 3, 16, 16)},
    ),
    "two towers": (clip, {"input_ids": IDS, "pixel_values": PIXELS}),
    "one tower of two": (
        lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**IMAGE)),
        {"pixel_values": PIXELS},
    ),
    "image to text": (
        lambda: joined("VisionEncoderDecoder", tf.ViTConfig(**IMAGE)),
        {"pixel_values": PIXELS, "decoder_input_ids": IDS},
    ),
    "text with image": (llava, {"input_ids": (2, 16 + 11), "pixel_values": PIXELS}),
    "text with packed patches": (
        qwen2_5_vl,
        {
            "input_ids": (2, 8 + 11),
            "pixel_values": (16 + 32, 3 * 4 * 4),
            "image_grid_thw": (2, 3),
            "mm_token_type_ids": (2, 8 + 11),
        },
    ),
    "text with images in tiles": (idefics3, {"input_ids": (2, 4 + 11), "pixel_values": (2, 1, 3, 16, 16)}),
    "mel bands": (
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(**TWO_SIDES, num_mel_bins=8, max_source_positions=20)
        ),
        {"input_features": (2, 8, 40), "decoder_input_ids": IDS},
    ),
    "mel frames": (
        lambda: tf.Speech2TextForConditionalGeneration(
            tf.Speech2TextConfig(**TWO_SIDES, input_feat_per_channel=8, max_source_positions=80, conv_channels=16)
        ),
        {"input_features": (2, 64, 8), "decoder_input_ids": IDS},
    ),
    "spectrogram": (
        lambda: tf.ASTForAudioClassification(
            tf.ASTConfig(
                **{key: IMAGE[key] for key in IMAGE if key != "image_size"},
                max_length=24,
                num_mel_bins=16,
                frequency_stride=4,
                time_stride=4,
            )
        ),
        {"input_values": (2, 24, 16)},
    ),
    "wave": (lambda: tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**WAVE)), {"input_values": (2, 650)}),
    "wave to text": (
        lambda: joined("SpeechEncoderDecoder", tf.Wav2Vec2Config(**WAVE)),
        {"input_values": (2, 650), "decoder_input_ids": IDS},
    ),
}


def idle(model: nn.Module) -> list[Tensor]:
    """Weights whose results may be read by nothing.

    The pooler of an encoder whose states a decoder reads; the last layer of a tower whose last but one gives the
    features, which releases of Transformers before 5.24 do not run.
    """
    if isinstance(model, tf.VisionEncoderDecoderModel):
        return [model.encoder.pooler.dense.weight]
    if isinstance(model, tf.LlavaForConditionalGeneration):
        return list(model.model.vision_tower.encoder.layers[-1].parameters())
    return []


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_takes_part_in_the_example(family: str) -> None:
    build, shapes = FAMILIES[family]
    model = build().eval()
    example = example_inputs(model)
    assert {name: tuple(tensor.shape) for name, tensor in example.items()} == shapes
    again = example_inputs(model)
    assert all(torch.equal(tensor, again[name]) for name, tensor in example.items())
    read = [model.get_parameter(reader) for site in discover(model, example).sites for reader in site.readers]
    linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    assert linears and set(map(id, linears)) - set(map(id, idle(model))) <= set(map(id, read))


def test_a_model_that_needs_more_than_pixels_asks_for_its_processor() -> None:
    with pytest.raises(PermpruneError, match=r"LlavaOnevision.*image_sizes.*its processor.*in Python"):
        example_inputs(llava_onevision())


def test_text_stands_alone_where_features_cannot_be_counted() -> None:
    assert example_inputs(llava().to("meta")).keys() == {"input_ids"}
    assert example_inputs(clip().to("meta")).keys() == {"input_ids", "pixel_values"}


def test_text_has_no_token_of_special_meaning_but_the_end() -> None:
    model = clip()
    for special in model.config.text_config.pad_token_id, model.config.text_config.bos_token_id:
        assert special not in example_inputs(model)["input_ids"]
    ids = example_inputs(model)["input_ids"]
    assert (ids[:, -1] == 2).all() and 2 not in ids[:, :-1]


def test_real_numbers_have_the_type_of_the_model() -> None:
    example = example_inputs(clip().bfloat16())
    assert example["pixel_values"].dtype == torch.bfloat16 and example["input_ids"].dtype == torch.int64


def resnet() -> nn.Module:
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_channels=1)
    return tf.ResNetForImageClassification(config).eval()


@pytest.mark.parametrize(
    ("changes", "height", "width"),
    [
        ({"size": {"height": 16, "width": 24}}, 16, 24),
        ({"size": {"shortest_edge": 20}}, 20, 20),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 36}}, 32, 36),
    ],
)
def test_the_processor_knows_the_size_where_the_config_does_not(
    changes: dict[str, Any], height: int, width: int, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", **changes})
    )
    example = example_inputs(resnet(), tf.AutoImageProcessor.from_pretrained(tmp_path))
    assert example["pixel_values"].shape == (2, 1, height, width)


def test_what_cannot_be_made_up_is_named() -> None:
    with pytest.raises(PermpruneError, match=r"takes pixel_values, which .* in Python"):
        example_inputs(resnet())

    class Odd(tf.ViTForImageClassification):
        def forward(self, pixel_values: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
            return pixel_values * depth

    with pytest.raises(PermpruneError, match="Odd takes depth, which cannot be generated"):
        example_inputs(Odd(tf.ViTConfig(**IMAGE)))


def test_random_inputs_keep_special_tokens_and_shapes() -> None:
    config = tf.LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, bos_token_id=1, eos_token_id=[2, 3])  # fmt: skip
    model = tf.LlamaForCausalLM(config)
    given = {
        "input_ids": torch.tensor([[1, 7, 7, 7, 2], [7, 7, 7, 3, 7]]),
        "pixel_values": torch.rand(2, 3, 4, 4),
        "image_sizes": torch.tensor([[4, 4], [2, 4]]),
    }
    made = random_like(model, given)
    ids = made["input_ids"]
    special = torch.isin(given["input_ids"], torch.tensor([1, 2, 3]))
    assert torch.equal(ids[special], given["input_ids"][special])
    assert not torch.isin(ids[~special], torch.tensor([1, 2, 3])).any() and len(ids[~special].unique()) > 4
    assert torch.equal(made["image_sizes"], given["image_sizes"])
    pixels = made["pixel_values"]
    assert pixels.shape == (2, 3, 4, 4) and float(pixels.min()) >= 0 and float(pixels.max()) <= 1
    assert not torch.isclose(pixels, given["pixel_values"]).all()
    again = random_like(model, given)
    assert all(torch.equal(again[name], tensor) for name, tensor in made.items())
