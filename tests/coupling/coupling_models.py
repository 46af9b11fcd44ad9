"""Tiny random models of many families, with every parameter random so that no wrong permutation goes unseen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm.models.vision_transformer
import torch
import transformers as tf
from torch import Tensor, nn

Example = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    build: Callable[[], nn.Module]
    example: Callable[[], Example]
    tolerance: float = 1e-10  # relative; families whose norms compute in float32 need more


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).double()


def tokens() -> Example:
    return {"input_ids": torch.randint(0, 60, (2, 7), generator=torch.Generator().manual_seed(1))}


def pixels() -> Example:
    return {"pixel_values": noise(2, 3, 16, 16)}


def both_texts() -> Example:
    return {**tokens(), "decoder_input_ids": tokens()["input_ids"]}


def speech() -> Example:
    return {"input_features": noise(1, 8, 40), "decoder_input_ids": tokens()["input_ids"][:1]}


def text_and_image() -> Example:
    return tokens() | pixels()


def text_with_image() -> Example:
    """One image of 16 patches in the middle of a text."""
    return {"input_ids": torch.tensor([[1, 5, *[60] * 16, 7, 9]]), "pixel_values": noise(1, 3, 16, 16)}


SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, **SPECIAL,
}  # fmt: skip
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
SHORT: dict[str, Any] = {**SMALL, "max_position_embeddings": 16}
IMAGE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1,
    **SPECIAL,
}  # fmt: skip
EXPERTS: dict[str, Any] = {**GROUPED, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
"""Experts in a form that computes in float64 on the CPU too."""


def llama(**changes: Any) -> nn.Module:
    settings: dict[str, Any] = {
        "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 24, "intermediate_size": 40,
        "num_hidden_layers": 2, "vocab_size": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**settings, **changes}))


def gemma3() -> nn.Module:
    attention = {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GROUPED, **attention))


def opt() -> nn.Module:
    width = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 32}
    return tf.OPTForCausalLM(tf.OPTConfig(vocab_size=64, num_hidden_layers=2, num_attention_heads=4, **width))


def falcon(**changes: Any) -> nn.Module:
    settings = {"vocab_size": 64, "hidden_size": 32, "ffn_hidden_size": 48, "num_hidden_layers": 2, **SPECIAL}
    return tf.FalconForCausalLM(tf.FalconConfig(**settings, num_attention_heads=4, **changes))


def bloom() -> nn.Module:
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, **SPECIAL))


def mixtral(**changes: Any) -> nn.Module:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**{**EXPERTS, "num_local_experts": 3, **changes}))


def qwen3_moe(**changes: Any) -> nn.Module:
    settings = {**EXPERTS, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 3}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**{**settings, **changes}))


def gpt_oss(**changes: Any) -> nn.Module:
    return tf.GptOssForCausalLM(tf.GptOssConfig(**{**EXPERTS, "head_dim": 8, "num_local_experts": 3, **changes}))


def deepseek_v3() -> nn.Module:
    """Latent attention, one dense layer, one of routed experts and a shared one."""
    latent = {"q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8}
    experts = {"moe_intermediate_size": 24, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
    settings = {**EXPERTS, "num_key_value_heads": 4, **latent, **experts, "first_k_dense_replace": 1}
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**settings))


def deberta_v2() -> nn.Module:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    return tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(**SHORT, **relative))


def modernbert() -> nn.Module:
    settings = {**SMALL, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4}
    return tf.ModernBertForMaskedLM(tf.ModernBertConfig(**settings))


def segformer() -> nn.Module:
    stages = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
    within = {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}
    return tf.SegformerForImageClassification(tf.SegformerConfig(**stages, **within))


def distilbert() -> nn.Module:
    width = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32}
    return tf.DistilBertForMaskedLM(tf.DistilBertConfig(vocab_size=64, **width))


def t5() -> nn.Module:
    width = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return tf.T5ForConditionalGeneration(tf.T5Config(**width))


def bart() -> nn.Module:
    return tf.BartForConditionalGeneration(tf.BartConfig(**ENCODER_DECODER, max_position_embeddings=32))


def marian() -> nn.Module:
    return tf.MarianMTModel(tf.MarianConfig(**ENCODER_DECODER, max_position_embeddings=32))


def whisper() -> nn.Module:
    positions = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**ENCODER_DECODER, **positions))


def wav2vec2(**changes: Any) -> nn.Module:
    ears = {"conv_dim": (16, 16), "conv_stride": (2, 2), "conv_kernel": (3, 2), "num_feat_extract_layers": 2}
    places = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 4}
    return tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**SMALL, **ears, **places, **changes))


def dinov2(**changes: Any) -> nn.Module:
    settings = {name: value for name, value in IMAGE.items() if name != "intermediate_size"}
    return tf.Dinov2ForImageClassification(tf.Dinov2Config(**settings, mlp_ratio=2, **changes))


def swin() -> nn.Module:
    stages = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "mlp_ratio": 2.0}
    return tf.SwinForImageClassification(tf.SwinConfig(image_size=16, patch_size=1, **stages))


def clip() -> nn.Module:
    towers = {"text_config": {**SHORT, "projection_dim": 24}, "vision_config": {**IMAGE, "projection_dim": 24}}
    return tf.CLIPModel(tf.CLIPConfig(**towers, projection_dim=24))


def siglip() -> nn.Module:
    return tf.SiglipModel(tf.SiglipConfig(text_config={**SHORT, "projection_size": 32}, vision_config=IMAGE))


def llava() -> nn.Module:
    parts = {"vision_config": tf.CLIPVisionConfig(**IMAGE), "text_config": tf.LlamaConfig(**GROUPED)}
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(**parts, image_token_id=60, vision_feature_layer=-1))


def paligemma() -> nn.Module:
    vision = {"model_type": "siglip_vision_model", **IMAGE, "projection_dim": 32}
    parts = {"vision_config": vision, "text_config": {"model_type": "gemma", **GROUPED, "head_dim": 8}}
    config = tf.PaliGemmaConfig(**parts, image_token_id=60, projection_dim=32, hidden_size=32)
    return tf.PaliGemmaForConditionalGeneration(config)


GRIDS = torch.tensor([[1, 4, 4], [1, 4, 8]])
"""Frames, rows and columns of patches of two images of different sizes, for models that merge 2 x 2 patches."""


def qwen_vl(model: type, config: type, vision: dict[str, Any]) -> nn.Module:
    sizes = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4,
        "temporal_patch_size": 1, "out_hidden_size": 32,
    }  # fmt: skip
    turned = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    marks = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    text = {**GROUPED, "head_dim": 8, "rope_parameters": turned}
    return model(config(text_config=text, vision_config={**sizes, **vision}, **marks))


def qwen2_5_vl() -> nn.Module:
    vision = {"window_size": 16, "fullatt_block_indexes": [1]}
    return qwen_vl(tf.Qwen2_5_VLForConditionalGeneration, tf.Qwen2_5_VLConfig, vision)


def qwen3_vl() -> nn.Module:
    vision = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return qwen_vl(tf.Qwen3VLForConditionalGeneration, tf.Qwen3VLConfig, vision)


def idefics3(model: type = tf.Idefics3ForConditionalGeneration, config: type = tf.Idefics3Config) -> nn.Module:
    text = tf.LlamaConfig(**GROUPED)
    return model(config(text_config=text, vision_config=IMAGE, image_token_id=60, scale_factor=2, pad_token_id=0))


def llava_onevision() -> nn.Module:
    parts = {"vision_config": tf.SiglipVisionConfig(**IMAGE), "text_config": tf.Qwen2Config(**GROUPED)}
    sizes = [[16, 16], [16, 32]]
    config = tf.LlavaOnevisionConfig(**parts, image_token_id=60, image_grid_pinpoints=sizes)
    return tf.LlavaOnevisionForConditionalGeneration(config)


def texts_with_images(*places: int) -> Example:
    """One text for each number of places of images that it holds, padded to the longest."""
    rows = [torch.tensor([1, 5, 62, *[60] * count, 63, 7, 9]) for count in places]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": ids.ne(0).long()}


def texts_with_patches() -> Example:
    """Two texts, each with an image; the patches of both images follow each other."""
    texts = texts_with_images(4, 8)
    kinds = texts["input_ids"].eq(60).int()
    return {**texts, "mm_token_type_ids": kinds, "pixel_values": noise(48, 48), "image_grid_thw": GRIDS}


def texts_with_padded_images() -> Example:
    """A text with two images, of which one is half as wide, and a text with one."""
    images, mask = noise(2, 2, 3, 16, 16), torch.ones(2, 2, 16, 16)
    images[0, 1, ..., 8:] = images[1, 1] = mask[0, 1, ..., 8:] = mask[1, 1] = 0
    return {**texts_with_images(8, 4), "pixel_values": images, "pixel_attention_mask": mask.long()}


def texts_with_tiles() -> Example:
    """Two texts, each with an image: one of a single tile, one of two, each beside the whole image as one more."""
    sizes = torch.tensor([[16, 16], [16, 32]])
    return {**texts_with_images(16 + 4 * 5, 16 + 4 * 9), "pixel_values": noise(2, 3, 3, 16, 16), "image_sizes": sizes}


def timm_vit() -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2, num_classes=5
    )


FAMILIES: dict[str, Family] = {
    "llama": Family(llama, tokens, 1e-5),
    "llama, tied embeddings": Family(lambda: llama(tie_word_embeddings=True), tokens, 1e-5),
    "llama, multi-head": Family(lambda: llama(num_key_value_heads=6), tokens, 1e-5),
    "llama, multi-query": Family(lambda: llama(num_key_value_heads=1), tokens, 1e-5),
    "llama, biases": Family(lambda: llama(attention_bias=True, mlp_bias=True), tokens, 1e-5),
    "llama, eager attention": Family(lambda: llama(attn_implementation="eager"), tokens, 1e-5),
    "mistral": Family(lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED)), tokens, 1e-5),
    "qwen2": Family(lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED)), tokens, 1e-5),
    "qwen3": Family(lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED, head_dim=8)), tokens, 1e-5),
    "gemma3": Family(gemma3, tokens, 1e-5),
    "phi3": Family(lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**GROUPED)), tokens, 1e-5),
    "gpt2": Family(
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
        tokens,
    ),
    "gpt-neox": Family(lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL)), tokens),
    "opt": Family(opt, tokens),
    "falcon, multi-query": Family(falcon, tokens),
    "falcon, grouped": Family(lambda: falcon(num_kv_heads=2, new_decoder_architecture=True), tokens),
    "bloom": Family(bloom, tokens),
    "mixtral": Family(mixtral, tokens, 1e-5),
    "qwen3-moe": Family(qwen3_moe, tokens, 1e-5),
    "gpt-oss": Family(gpt_oss, tokens, 1e-5),
    "deepseek-v3": Family(deepseek_v3, tokens, 1e-5),
    "qwen2.5-vl, text alone": Family(qwen2_5_vl, tokens, 1e-5),
    "bert": Family(lambda: tf.BertModel(tf.BertConfig(**SMALL)), tokens),
    "bert, classifier": Family(lambda: tf.BertForSequenceClassification(tf.BertConfig(**SMALL)), tokens),
    "roberta": Family(lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**SHORT)), tokens),
    "distilbert": Family(distilbert, tokens),
    "mpnet": Family(lambda: tf.MPNetForMaskedLM(tf.MPNetConfig(**SHORT)), tokens),
    "albert": Family(lambda: tf.AlbertForMaskedLM(tf.AlbertConfig(**SMALL, embedding_size=16)), tokens),
    "deberta-v2": Family(deberta_v2, tokens),
    "modernbert": Family(modernbert, tokens),
    "t5": Family(t5, both_texts, 1e-5),
    "bart": Family(bart, both_texts),
    "marian": Family(marian, both_texts),
    "vit": Family(lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGE)), pixels),
    "deit": Family(lambda: tf.DeiTForImageClassificationWithTeacher(tf.DeiTConfig(**IMAGE)), pixels),
    "dinov2": Family(dinov2, pixels),
    "dinov2, swiglu": Family(lambda: dinov2(use_swiglu_ffn=True), pixels),
    "swin": Family(swin, pixels),
    "segformer": Family(segformer, pixels),
    "clip": Family(clip, text_and_image),
    "siglip": Family(siglip, text_and_image),
    "llava": Family(llava, text_with_image, 1e-5),
    "paligemma": Family(paligemma, text_with_image, 1e-5),
    "llava-onevision, images of two sizes": Family(llava_onevision, texts_with_tiles, 1e-5),
    "qwen2.5-vl, images of two sizes": Family(qwen2_5_vl, texts_with_patches, 1e-5),
    "qwen3-vl, images of two sizes": Family(qwen3_vl, texts_with_patches, 1e-5),
    "idefics3, images of two sizes": Family(idefics3, texts_with_padded_images, 1e-5),
    "smolvlm, images of two sizes": Family(
        lambda: idefics3(tf.SmolVLMForConditionalGeneration, tf.SmolVLMConfig), texts_with_padded_images, 1e-5
    ),
    "whisper": Family(whisper, speech),
    "wav2vec2": Family(wav2vec2, lambda: {"input_values": noise(1, 64)}),
    "wav2vec2, pre-norm": Family(
        lambda: wav2vec2(do_stable_layer_norm=True, feat_extract_norm="layer"), lambda: {"input_values": noise(1, 64)}
    ),
    "timm vit": Family(timm_vit, lambda: {"x": noise(2, 3, 16, 16)}),
}


def randomised(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """The model in double precision and evaluation mode, each parameter drawn anew."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model
