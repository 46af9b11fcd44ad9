"""Tiny random models of several families, with every parameter random so that no wrong permutation goes
unseen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

Example = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    build: Callable[[], nn.Module]
    example: Callable[[], Example]
    tolerance: float = 1e-10  # relative; families whose norms compute in float32 need more


def tokens() -> Example:
    return {"input_ids": torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))}


def pixels() -> Example:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()}


def speech() -> Example:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_features": torch.randn(1, 8, 40, generator=generator).double(),
        "decoder_input_ids": tokens()["input_ids"][:1],
    }


def llama(**changes: Any) -> nn.Module:
    settings: dict[str, Any] = {
        "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 24, "intermediate_size": 40,
        "num_hidden_layers": 2, "vocab_size": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**settings, **changes}))


SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
IMAGE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
WHISPER: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
    "max_source_positions": 20, "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama-gqa": Family(llama, tokens, 1e-5),
    "llama-tied": Family(lambda: llama(tie_word_embeddings=True), tokens, 1e-5),
    "llama-mha": Family(lambda: llama(num_key_value_heads=6), tokens, 1e-5),
    "llama-mqa": Family(lambda: llama(num_key_value_heads=1), tokens, 1e-5),
    "llama-bias": Family(lambda: llama(attention_bias=True, mlp_bias=True), tokens, 1e-5),
    "llama-eager": Family(lambda: llama(attn_implementation="eager"), tokens, 1e-5),
    "qwen3": Family(
        lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)), tokens, 1e-5
    ),
    "phi3": Family(
        lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SMALL, num_key_value_heads=2, pad_token_id=0)),
        tokens,
        1e-5,
    ),
    "gpt2": Family(
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
        tokens,
    ),
    "gpt-neox": Family(lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL)), tokens),
    "opt": Family(
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(
                vocab_size=64,
                hidden_size=32,
                word_embed_proj_dim=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=32,
            )
        ),
        tokens,
    ),
    "bert": Family(lambda: tf.BertModel(tf.BertConfig(**SMALL)), tokens),
    "bert-classifier": Family(lambda: tf.BertForSequenceClassification(tf.BertConfig(**SMALL)), tokens),
    "vit": Family(lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGE)), pixels),
    "whisper": Family(lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**WHISPER)), speech),
    "t5": Family(
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        ),
        lambda: {**tokens(), "decoder_input_ids": tokens()["input_ids"]},
        1e-5,
    ),
    "albert": Family(lambda: tf.AlbertForMaskedLM(tf.AlbertConfig(**SMALL, embedding_size=16)), tokens),
}


def randomised(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """The model in double precision and evaluation mode, each parameter drawn anew."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model
