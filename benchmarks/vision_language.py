"""A small vision-language model of two others, and images with questions and answers for it.

CLIP ViT-B/16's patch features take the place of image tokens of SmolLM2-135M, as in LLaVA (Liu et al. 2023, arXiv
2304.08485). The projector between them alone is trained, as in its first stage, on images of CIFAR-10, each with one of
two questions. The images are small, so that half of CLIP's resolution suffices: 49 tokens. Writes the folders model/,
photos/ to calibrate on and other/ to measure on.

python benchmarks/vision_language.py --out .
"""

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar10 import images
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from zoo import folder_of

from permprune import read_model
from permprune.data.load import load_examples

IMAGE = "<image>"
"""The token that stands for a part of an image."""

POSITIONS = "embeddings.position_embedding.weight"

TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}\
<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

SIZE = 112
"""The height and width of images, in pixels."""

VEHICLES = {"airplane", "automobile", "ship", "truck"}

COUNTS = {"train": 2400, "photos": 800, "other": 400}
"""The parts of CIFAR-10, and how many of their images are in the folder of the same name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    build(options.out, batch=options.batch, rate=options.rate, seed=options.seed)


def build(out: Path, *, batch: int = 8, rate: float = 1e-3, seed: int = 0) -> None:
    """Write the images, and the model with a projector trained in one pass over those of train/."""
    for part, count in COUNTS.items():
        write_images(out / part, part, count, seed)
    torch.manual_seed(seed)
    model, processor = joined()
    train(model, processor, out / "train", batch=batch, rate=rate, seed=seed)
    model.save_pretrained(out / "model")
    processor.save_pretrained(out / "model")


def write_images(folder: Path, part: str, count: int, seed: int) -> None:
    """Write images of a part of CIFAR-10, each with a question and its answer."""
    draw, rows = random.Random(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for number, (png, name) in enumerate(images(part)[:count]):
        kind = "a vehicle" if name in VEHICLES else "an animal"
        article = "an" if name[0] in "aeiou" else "a"
        question, answer = draw.choice([("What is this?", f"{article} {name}"), ("An animal or a vehicle?", kind)])
        (folder / f"{number}.png").write_bytes(png)
        rows.append(json.dumps({"file_name": f"{number}.png", "question": question, "answer": answer}))
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")


def joined() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The two models in one, with a projector that is random, and their processor."""
    tower, pictures, _ = read_model(folder_of("clip-vit-b16"))
    writer, tokenizer, _ = read_model("smollm2-135m")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    writer.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower.config.to_dict() | {"image_size": SIZE}),
        text_config=writer.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).eval()
    weights = tower.vision_model.state_dict()
    weights[POSITIONS] = smaller(weights[POSITIONS], SIZE // tower.config.patch_size)
    model.model.vision_tower.load_state_dict(weights)
    model.model.language_model.load_state_dict(writer.model.state_dict())
    pictures.size, pictures.crop_size = {"shortest_edge": SIZE}, {"height": SIZE, "width": SIZE}
    processor = LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return model, processor


def smaller(positions: Tensor, side: int) -> Tensor:
    """The embeddings (1 + patches, channels) of the class token and a square of patches, for one of `side` patches."""
    old = round((len(positions) - 1) ** 0.5)
    square = positions[1:].T.unflatten(1, (old, old))[None]
    resized = F.interpolate(square, (side, side), mode="bicubic", antialias=True)
    return torch.cat([positions[:1], resized[0].flatten(1).T])


def train(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, source: Path, *, batch: int, rate: float, seed: int
) -> None:
    """Train the projector with Adam on the answers, in one pass, at a rate that rises and falls to 0."""
    count = COUNTS["train"]
    shown = load_examples(str(source), model, processor, part="calibration", count=count, seed=seed).split(batch)
    projector = model.requires_grad_(False).model.multi_modal_projector.requires_grad_(True)
    optimizer = torch.optim.Adam(projector.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=len(shown), pct_start=0.1)
    for number, examples in enumerate(shown, 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**examples).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        print(f"step {number} of {len(shown)}: loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
