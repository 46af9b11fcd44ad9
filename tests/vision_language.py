"""Tiny random vision-language models with their processors, and images with texts for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, ProcessorMixin

SPECIAL = [
    "<pad>", "<s>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>", "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
]  # fmt: skip

TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}\
<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**LAYERS, "image_size": 16, "patch_size": 4}


def make_tokenizer() -> tf.PreTrainedTokenizerFast:
    """A tokenizer of bytes and of the markers of all these models."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=[token for token in SPECIAL if token not in ("<pad>", "<|im_end|>")],
    )


def _text(tokenizer: tf.PreTrainedTokenizerFast) -> dict[str, int]:
    return {**LAYERS, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 3}


def qwen() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen2.5-VL: images of 8 to 32 pixels a side, in packed patches of 4 x 4, of which 2 x 2 are one token."""
    tokenizer = make_tokenizer()
    sizes = {"patch_size": 4, "temporal_patch_size": 1, "merge_size": 2}
    pixels = {"shortest_edge": 8 * 8, "longest_edge": 16 * 32}
    processor = tf.Qwen2_5_VLProcessor(
        tf.Qwen2VLImageProcessor(**sizes, size=pixels),
        tokenizer,
        tf.Qwen2VLVideoProcessor(**sizes, size=pixels),
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    marks = ("image", "video", "vision_start", "vision_end")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    turned = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 4, "window_size": 16,
        "temporal_patch_size": 1, "fullatt_block_indexes": [1], "out_hidden_size": 32,
    }  # fmt: skip
    config = tf.Qwen2_5_VLConfig(
        text_config={**_text(tokenizer), "rope_parameters": turned},
        vision_config=vision,
        **{f"{mark}_token_id": SPECIAL.index(token) for mark, token in zip(marks, tokens, strict=True)},
    )
    return _drawn(tf.Qwen2_5_VLForConditionalGeneration, config), processor


def idefics() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Idefics3: images cut into tiles of 16 x 16 beside the whole image, of which each is 4 tokens."""
    tokenizer = make_tokenizer()
    maker = tf.Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = tf.Idefics3Processor(
        maker, tokenizer, image_seq_len=4, chat_template=TEMPLATE.replace("IMAGE", "<image>")
    )
    config = tf.Idefics3Config(
        text_config=tf.LlamaConfig(**_text(tokenizer)),
        vision_config=VISION,
        image_token_id=SPECIAL.index("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    return _drawn(tf.Idefics3ForConditionalGeneration, config), processor


def llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA without a chat template: images cut to 16 x 16, of 16 tokens."""
    tokenizer = make_tokenizer()
    maker = tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = tf.LlavaProcessor(maker, tokenizer, patch_size=4, vision_feature_select_strategy="full")
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**_text(tokenizer)),
        vision_config=tf.SiglipVisionConfig(**VISION),
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return _drawn(tf.LlavaForConditionalGeneration, config), processor


def _drawn(kind: type, config: tf.PreTrainedConfig) -> PreTrainedModel:
    """The model with random weights, in fp32; drawn wide, so that it tells its inputs apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = kind(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.15)
    return model


MODELS = {"qwen2.5-vl": qwen, "idefics3": idefics, "llava": llava}


def write_images(folder: Path, count: int) -> list[Path]:
    """Noise of 16 x 16 and 16 x 32 pixels in turn, as PNG files."""
    generator, files = np.random.default_rng(0), []
    folder.mkdir(exist_ok=True)
    for number in range(count):
        pixels = generator.integers(256, size=(16, 16 + 16 * (number % 2), 3), dtype=np.uint8)
        files.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(files[-1])
    return files


def write_pairs(folder: Path, count: int) -> Path:
    """A folder of images, and a table of questions about them with answers of different lengths."""
    rows = []
    for number, file in enumerate(write_images(folder, count)):
        answer = " ".join(["two", "of", "every", "four"][: 1 + number % 4])
        rows.append({"file_name": file.name, "question": "which weights?", "answer": answer})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder
