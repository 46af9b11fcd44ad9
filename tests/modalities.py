"""Tiny random models of other data than causal text, and examples for them; always the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from permprune.examples import Examples

COUNT = 12
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def vit_config() -> ViTConfig:
    return ViTConfig(**SHAPE, image_size=8, patch_size=4, num_labels=5)


def bert_config() -> BertConfig:
    return BertConfig(**SHAPE, vocab_size=64, max_position_embeddings=32, num_labels=3)


def whisper_config() -> WhisperConfig:
    return WhisperConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": lambda: ViTForImageClassification(vit_config()),
    "bert": lambda: BertForSequenceClassification(bert_config()),
    "whisper": lambda: WhisperForConditionalGeneration(whisper_config()),
    "headless": lambda: ViTModel(vit_config()),
}


def make(name: str) -> PreTrainedModel:
    """In fp32 and evaluation mode; weights are drawn wide, so that a random model tells its inputs apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.15)
    return model


def draw(classes: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def images(labels: bool = True) -> Examples:
    pixels = torch.randn(COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Examples({"pixel_values": pixels, **({"labels": draw(5, COUNT)} if labels else {})})


def sentences(labels: bool = True) -> Examples:
    """Of 3 to 9 tokens, padded to 9 with tokens that would be seen if the mask were not heeded."""
    mask = (torch.arange(9) < 3 + draw(7, COUNT, 1, seed=1)).long()
    tensors = {"input_ids": draw(64, COUNT, 9), "attention_mask": mask}
    return Examples({**tensors, **({"labels": draw(3, COUNT)} if labels else {})})


def speech() -> Examples:
    """Transcripts of 4 to 7 tokens, -100 behind them."""
    features = torch.randn(COUNT, 8, 20, generator=torch.Generator().manual_seed(0))
    labels = (3 + draw(61, COUNT, 7)).masked_fill(torch.arange(7) >= 4 + draw(4, COUNT, 1, seed=1), -100)
    return Examples({"input_features": features, "labels": labels})


EXAMPLES: dict[str, Callable[[], Examples]] = {
    "vit": images,
    "bert": sentences,
    "whisper": speech,
    "headless": lambda: images(labels=False),
}


def scorer() -> PreTrainedModel:
    """A model that gives one score for each sentence."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = bert_config()
        config.num_labels = 1
        return BertForSequenceClassification(config).float().eval()
