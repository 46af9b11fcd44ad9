"""Every zoo model, fetched and converted where the cache does not hold it, and a figure that shows it works: Markdown.

python benchmarks/zoo.py
python benchmarks/zoo.py --models whisper-tiny-en --speech LibriSpeech/test-clean/237/134500

--speech takes a folder with FLAC files and a .trans.txt as LibriSpeech has them, and needs the package soundfile.
"""

import argparse
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
    logging,
)

from permprune import Evaluation, perplexity, read_model
from permprune.zoo.images import CLASSES, Images, load_images
from permprune.zoo.models import MODELS, resolve_model

PAIRS = [
    ("A man is playing a guitar.", "Someone plays music on a string instrument."),
    ("The cat sleeps on the sofa.", "A kitten is dozing on the couch."),
    ("Shares fell sharply on Monday.", "The stock market dropped at the start of the week."),
    ("How do I bake bread?", "What is the recipe for a loaf of bread?"),
    ("The rocket reached orbit.", "A spacecraft was launched into space."),
]
"""Sentences that mean nearly the same; those of different pairs have nothing in common."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--speech", type=Path, help="folder of clips with transcripts; without it none is transcribed")
    parser.add_argument("--images", type=int, default=200, help="to classify, and to make the centroids of")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print("| model | license | download MB | parameters M | seconds to fetch and convert | figure |")
    print("|---|---|---|---|---|---|")
    for name in options.models:
        started = time.monotonic()
        folder = Path(resolve_model(name))
        seconds = time.monotonic() - started
        figure, parameters = measure(name, folder, options)
        entry = MODELS[name]
        cells = (name, entry.license, str(entry.size), f"{parameters / 1e6:.1f}", f"{seconds:.0f}", figure)
        print(f"| {' | '.join(cells)} |", flush=True)


@torch.inference_mode()
def measure(name: str, folder: Path, options: argparse.Namespace) -> tuple[str, int]:
    """A figure in words, and how many parameters the model has; the kind of processor tells what the model reads."""
    if (folder / "preprocessor_config.json").exists():
        model = AutoModel.from_pretrained(folder).eval()
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        right, count = nearest_centroid(model, processor, options.images)
        figure = f"{right} of {count} images next to the centroid of their class"
    elif (folder / "processor_config.json").exists():
        model = AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()
        processor = AutoProcessor.from_pretrained(folder)
        figure = "none without --speech"
        if options.speech:
            wrong, count = word_errors(model, processor, options.speech)
            figure = f"{wrong} wrong words of {count}"
    elif "ForCausalLM" in AutoConfig.from_pretrained(folder).architectures[0]:
        model, tokenizer, _ = read_model(name)
        tokens = Evaluation(windows=8, length=256).examples(model, tokenizer)
        figure = f"perplexity {perplexity(model, tokens).value:.2f} on film reviews"
    else:
        model = AutoModel.from_pretrained(folder).eval()
        same, other = similarities(model, AutoTokenizer.from_pretrained(folder))
        figure = f"cosine {same:.2f} of related sentences, {other:.2f} of others"
    return figure, sum(parameter.numel() for parameter in model.parameters())


def similarities(model, tokenizer) -> tuple[float, float]:
    """Least cosine within the pairs, largest between them."""
    texts = [text for pair in PAIRS for text in pair]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    weights = inputs.attention_mask.unsqueeze(-1)
    means = (model(**inputs).last_hidden_state * weights).sum(1) / weights.sum(1)
    cosines = torch.nn.functional.normalize(means) @ torch.nn.functional.normalize(means).T
    pair = torch.arange(len(texts)) // 2
    same = pair[:, None] == pair
    return float(cosines[same].min()), float(cosines[~same].max())


def nearest_centroid(model, processor, count: int) -> tuple[int, int]:
    """How many evaluation images lie next to their class's mean of `count` probe images, and of how many."""
    probe, evaluation = (load_images(part) for part in ("probe", "evaluation"))
    known, asked = (features(model, processor, images, count) for images in (probe, evaluation))
    labels = torch.from_numpy(probe.labels[:count])
    centroids = torch.stack([known[labels == label].mean(0) for label in range(len(CLASSES))])
    nearest = (asked @ torch.nn.functional.normalize(centroids).T).argmax(1)
    return int((nearest == torch.from_numpy(evaluation.labels[:count])).sum()), count


def features(model, processor, images: Images, count: int) -> Tensor:
    """Pooled outputs of the first images, of length 1, fp32 (count, width)."""
    parts = []
    for batch in np.array_split(images.pixels[:count], -(-count // 20)):
        pixels = processor(images=list(batch), return_tensors="pt").pixel_values
        parts.append(model(pixels).pooler_output)
    return torch.nn.functional.normalize(torch.cat(parts))


def word_errors(model, processor, folder: Path) -> tuple[int, int]:
    """Words inserted, deleted and replaced, and words spoken."""
    wrong = count = 0
    for sound, rate, words in clips(folder):
        inputs = processor(sound, sampling_rate=rate, return_tensors="pt")
        (text,) = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
        wrong += distance(words, re.findall(r"[A-Z']+", text.upper()))
        count += len(words)
    return wrong, count


def clips(folder: Path) -> Iterator[tuple[np.ndarray, int, list[str]]]:
    """Sound, samples a second, and the words in capitals."""
    import soundfile

    for transcript in sorted(folder.rglob("*.trans.txt")):
        for line in transcript.read_text(encoding="utf-8").splitlines():
            name, *words = line.split()
            yield *soundfile.read(transcript.with_name(f"{name}.flac")), words


def distance(one: list[str], other: list[str]) -> int:
    """Levenshtein's, in words."""
    row = list(range(len(other) + 1))
    for i, word in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, heard in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != heard))
    return row[-1]


if __name__ == "__main__":
    main()
