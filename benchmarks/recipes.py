"""Run the recipes of docs/recipes/ as a user would, and measure what they reach: a row for each recipe.

A recipe is a `permprune prune`, which measures the dense model and the model pruned without search and training as
well, and a `permprune pack`. The packed model is measured by `permprune evaluate`, its size and speed by `permprune
bench`. Commands run on one thread; minutes are processor time, child processes included. A command that has run is not
run again, so that an interrupted recipe goes on with the command that was interrupted.

Models come from the zoo and from benchmarks/zoo.py, images from benchmarks/cifar10.py. --data is a folder with the
other data: c4/c4_sample_700.jsonl, wikitext-2/wiki.test.raw, glue/SST-2 and glue/STS-B (train.tsv, dev.tsv),
librispeech/ with one chapter of LibriSpeech, and ljspeech/ with clips of LJ Speech.

python benchmarks/recipes.py --data DATA --work WORK --rows docs/results/recipes.jsonl --only minilm-l6
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rows
from cifar10 import CLASSES, write
from join_speech import join
from probe import BATCH, probe
from vision_language import build
from zoo import folder_of

from permprune.evaluation.result import EXACT_MATCH, NEAREST, NEAREST_TEN, SIMILARITIES

Row = dict[str, Any]

THREADS = 1


@dataclass(frozen=True)
class Workplace:
    """The folder of the files given, and the one that a recipe works in, where its commands run."""

    data: Path
    work: Path

    def run(self, name: str, *arguments: str) -> None:
        """Run a command of permprune; `name`.cost has its processor time in minutes, and marks it as done."""
        cost = self.work / f"{name}.cost"
        if cost.exists():
            return
        print(f"{self.work.name}: permprune {' '.join(arguments)}", flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(Path(__file__).parents[1])}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "permprune", "--verbose", *arguments]
        subprocess.run(command, cwd=self.work, env=environment, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        cost.write_text(str(seconds / 60), encoding="utf-8")

    def minutes(self, name: str) -> float:
        """The processor time of a command, in minutes."""
        return float((self.work / f"{name}.cost").read_text(encoding="utf-8"))

    def model(self, folder: str, *arguments: str) -> None:
        """Run a command that writes the folder of a model; what an interrupted one left is removed first."""
        if not (self.work / f"{folder}.cost").exists():
            for left in (folder, f"{folder}.partial"):
                shutil.rmtree(self.work / left, ignore_errors=True)
        self.run(folder, *arguments, "--out", folder)

    def figures(self, name: str, *arguments: str) -> Any:
        """Run a command that writes figures, and return them."""
        self.run(name, *arguments, "--json", f"{name}.json")
        return json.loads((self.work / f"{name}.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Measure:
    """Another measure: its title, and the options of `permprune evaluate` for it; `metric` selects one of several.

    `unit` is share, perplexity or correlation, which tables show differently.
    """

    title: str
    options: str
    unit: str = "share"
    metric: str | None = None


@dataclass(frozen=True)
class Recipe:
    """How a model is pruned and measured.

    `model` is a name of the zoo, or a folder that `prepare` leaves in the recipe's folder. `prune` are the options of
    `permprune prune` and `pack` those of `permprune pack`, without the output; `data` are those for the evaluation, and
    `title` and `unit` say what they measure. `evaluate` are the options of `permprune evaluate`, if not the same.
    `speed` tells what `permprune bench`, with the options `bench`, counts.
    """

    model: str
    prune: str
    data: str
    title: str
    speed: str
    bench: str
    pack: str = "--dtype int8 --head int8"
    evaluate: str = ""
    unit: str = "share"
    others: Sequence[Measure] = ()
    prepare: Callable[[Workplace], None] = lambda place: None


def measured(recipe: Recipe, place: Workplace) -> Row:
    """The row of a recipe: what the commands cost and reach."""
    recipe.prepare(place)
    prune, data = recipe.prune.split(), recipe.data.split()
    place.model("pruned", "prune", recipe.model, *prune, *data)
    place.model("packed", "pack", "pruned", *recipe.pack.split())
    record = json.loads((place.work / "pruned" / "permprune.json").read_text(encoding="utf-8"))
    own = record["measured"]
    first: Row = {"title": recipe.title, "unit": recipe.unit, "dense": own["dense"], "plain": own["none"]}
    options = recipe.evaluate or recipe.data
    asked = [measure.options for measure in recipe.others]
    file = f"pruned-{asked.index(options)}" if options in asked else "packed-data"
    first |= {"pruned": value(place, file, "packed", options), "count": own["count"], "of": own["unit"]}
    mixed = "--pattern" in prune  # the record's plain model has the same mix
    if recipe.others or mixed:
        place.model("plain", "prune", recipe.model, *plain(prune), *data)
    if mixed:
        first["plain"] = value(place, "plain-data", "plain", options)
    models = {"dense": recipe.model, "plain": "plain", "pruned": "packed"}
    others: list[Row] = []
    for measure in recipe.others:
        others.append({"title": measure.title, "unit": measure.unit})
        for name, model in models.items():
            file = f"{name}-{asked.index(measure.options)}"  # one command for the measures with the same options
            others[-1][name] = value(place, file, model, measure.options, measure.metric)
    return {
        "command": " ".join(["permprune prune", recipe.model, *prune, *data, "--out pruned"]),
        "minutes": round(place.minutes("pruned"), 1),
        "peak_memory_mb": record["peak_memory_mb"],
        "seed": record["settings"]["seed"],
        "threads": THREADS,
        "measures": [first, *others],
        "speed": recipe.speed,
        **speeds(place, recipe),
    }


def plain(prune: list[str]) -> list[str]:
    """The options of the same run at 2:4 without search and training."""
    searching = {"--effort", "--order", "--minutes", "--update", "--pattern", "--candidates", "--keep"}
    pairs = zip(prune[::2], prune[1::2], strict=True)
    return [*(word for pair in pairs if pair[0] not in searching for word in pair), "--order", "none"]


def value(place: Workplace, name: str, model: str, options: str, metric: str | None = None) -> float:
    """What `permprune evaluate` says of a model: the value of a metric, by default of the first."""
    found = place.figures(name, "evaluate", model, *options.format(data=place.data).split())
    results = [found, *found.get("others", [])]
    return float(next(one["value"] for one in results if metric in (None, one["metric"])))


def speeds(place: Workplace, recipe: Recipe) -> Row:
    """Bytes of the dense model in bf16 and of the packed one, and speeds; the dense one is that of the faster type."""
    found = place.figures(
        "bench", "bench", "packed", "--dense", recipe.model, "--threads", str(THREADS), *recipe.bench.split()
    )
    dense, packed = ([row for row in found["rows"] if row["dense"] is wanted] for wanted in (True, False))
    of_bf16 = next(row for row in dense if row["name"].endswith("(bf16)"))
    rate = "decode" if "decode" in packed[0]["speeds"][0] else "items"
    cells = [
        {"batch": speed["batch"]}
        | {name: max(row["speeds"][at][rate] for row in own) for name, own in (("dense", dense), ("pruned", packed))}
        for at, speed in enumerate(packed[0]["speeds"])
    ]
    return {"bytes": {"dense": of_bf16["bytes"], "pruned": packed[0]["bytes"]}, "speeds": cells}


def text(place: Workplace) -> None:
    """Documents of C4: the last hundred are kept from the calibration."""
    lines = (place.data / "c4" / "c4_sample_700.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("c4.jsonl", lines[:-100]), ("other.jsonl", lines[-100:])):
        (place.work / name).write_text("".join(part), encoding="utf-8")


def texts(place: Workplace) -> None:
    """The paragraphs of the same documents of 30 characters or more, cut at 600, a text in each line."""
    text(place)
    for name in ("c4", "other"):
        documents = (place.work / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        lines = [line.strip() for document in documents for line in json.loads(document)["text"].splitlines()]
        kept = "\n".join(line[:600] for line in lines if len(line) >= 30)
        (place.work / f"{name}.txt").write_text(kept, encoding="utf-8")


def sentiment(place: Workplace) -> None:
    """Rows of SST-2 with twelve words or more are sentences, the others phrases; a fifth of the sentences is kept back.

    The dense model is MiniLM, fine-tuned on 10,000 of the other rows.
    """
    head, *lines = (place.data / "glue" / "SST-2" / "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    sentences = [line for line in lines if len(line.partition("\t")[0].split()) >= 12]
    kept = set(sentences[4::5])
    parts = {
        "rows.tsv": [line for line in lines if line not in kept],
        "sentences.tsv": [line for line in sentences if line not in kept],
        "other.tsv": sentences[4::5],
    }
    for name, chosen in parts.items():
        (place.work / name).write_text("".join([head, *chosen]), encoding="utf-8")
    place.model("minilm-sst2", "finetune", "minilm-l6", "--data", "rows.tsv", "--rows", "10000")


def probed(model: str, windows: int) -> Callable[[Workplace], None]:
    """Images of CIFAR-10, and a linear classifier of them on the features of a model."""

    def prepare(place: Workplace) -> None:
        write(place.work)
        if not (place.work / f"{model}-cifar10").exists():
            probe(model, place.work / f"{model}-cifar10", str(place.work / "train"), CLASSES, BATCH * windows)

    return prepare


def speech(place: Workplace) -> None:
    """Whisper; sounds to calibrate on, and clips with texts to measure on.

    300 sounds are joined of half of the clips of LibriSpeech and those of LJ Speech; the other half has texts.
    """
    if not (place.work / "whisper-tiny-en").exists():
        shutil.copytree(folder_of("whisper-tiny-en"), place.work / "whisper-tiny-en")
    source = place.data / "librispeech"
    clips = sorted(source.rglob("*.flac"))
    for folder, chosen in (("clips", clips[::2]), ("other", clips[1::2])):
        if not (place.work / folder).exists():
            (place.work / folder).mkdir()
            for clip in chosen:
                shutil.copy(clip, place.work / folder)
    tables = [file.read_text(encoding="utf-8") for file in source.rglob("*.trans.txt")]
    texts = dict(line.split(" ", 1) for table in tables for line in table.splitlines())
    said = [json.dumps({"file_name": clip.name, "text": texts[clip.stem]}) for clip in clips[1::2]]
    (place.work / "other" / "metadata.jsonl").write_text("\n".join(said), encoding="utf-8")
    if not (place.work / "speech").exists():
        join([place.work / "clips", place.data / "ljspeech"], place.work / "speech", count=300)


def vision_language(place: Workplace) -> None:
    """CLIP ViT-B/16 and SmolLM2 with a projector trained on CIFAR-10, and other images of it with questions."""
    if not (place.work / "model").exists():
        build(place.work)


AGREEMENT = "--data other.txt --windows 30 --length 128 --dense minilm-l6"
"""The options that compare the embeddings of unseen texts with those of the dense model."""

RECIPES = {
    "llava": Recipe(
        model="model",
        prepare=vision_language,
        prune="--calibration photos --samples 400 --order ria --update admm --train steps=150:rate=0.0005",
        data="--data other --windows 200",
        title="perplexity of the answers",
        unit="perplexity",
        others=[Measure("exact match of the answers", "--data other --windows 200", "share", EXACT_MATCH.name)],
        speed="generated tokens",
        bench="--batch 1 --context 128 --turns 3",
    ),
    "smollm2-135m": Recipe(
        model="smollm2-135m",
        prepare=text,
        prune="--calibration c4.jsonl",
        data="--data other.jsonl",
        title="perplexity, C4",
        unit="perplexity",
        others=[Measure("perplexity, WikiText-2 raw", "--data {data}/wikitext-2/wiki.test.raw", "perplexity")],
        speed="generated tokens",
        bench="--batch 1,8 --context 128",
    ),
    "qwen2.5-coder-1.5b": Recipe(
        model="qwen2.5-coder-1.5b",
        prepare=text,
        prune="--calibration c4.jsonl --memory 6GB",
        data="--data other.jsonl --windows 8",
        title="perplexity, C4",
        unit="perplexity",
        speed="generated tokens",
        bench="--batch 1 --context 128",
    ),
    "minilm-l6": Recipe(
        model="minilm-l6",
        prepare=texts,
        prune="--calibration c4.txt --length 128 --pattern mixed --candidates dense,2:4 --keep 0.6 --effort hour",
        data="--data other.txt --windows 30",
        evaluate=AGREEMENT,
        title="cosine to the dense model",
        unit="correlation",
        others=[
            Measure("rank correlation of similarities", AGREEMENT, "correlation", SIMILARITIES.name),
            Measure("same nearest neighbour", AGREEMENT, "share", NEAREST.name),
            Measure("ten nearest neighbours", AGREEMENT, "share", NEAREST_TEN.name),
            Measure("STS-B, rank correlation", "--data {data}/glue/STS-B/dev.tsv --windows 100", "correlation"),
        ],
        pack="--dtype bf16 --head int8",
        speed="texts of 32 tokens",
        bench="--batch 1,8 --context 32",
    ),
    "minilm-sst2": Recipe(
        model="minilm-sst2",
        prepare=sentiment,
        prune="--calibration sentences.tsv --length 128",
        data="--data other.tsv --windows 64",
        title="accuracy, other sentences",
        speed="sentences of 32 tokens",
        bench="--batch 1,8 --context 32",
    ),
    "vit-s14": Recipe(
        model="vit-s14-cifar10",
        prepare=probed("vit-s14", 24),
        prune="--order ria --update admm --train steps=200 --samples 250 --calibration photos",
        data="--data other --windows 24",
        title="top-1 accuracy",
        pack="--dtype int8",
        speed="images",
        bench="--batch 1 --turns 5",
    ),
    "clip-vit-b16": Recipe(
        model="clip-vit-b16-cifar10",
        prepare=probed("clip-vit-b16", 40),
        prune="--order ria --update admm --train steps=60:rate=0.0004 --samples 250 --calibration photos",
        data="--data other --windows 12",
        title="top-1 accuracy",
        pack="--dtype int8",
        speed="images",
        bench="--batch 1 --turns 5",
    ),
    "whisper-tiny-en": Recipe(
        model="whisper-tiny-en",
        prepare=speech,
        prune="--calibration speech --pattern mixed --candidates dense,2:4 --keep 0.6",
        data="--data other",
        title="word error rate",
        speed="clips of 16 tokens",
        bench="--batch 1 --turns 5",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the files that recipes name")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and figures")
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    parser.add_argument("--only", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="NAME")
    options = parser.parse_args()
    for name in options.only:
        place = Workplace(options.data.resolve(), options.work.resolve() / name)
        place.work.mkdir(parents=True, exist_ok=True)
        row = measured(RECIPES[name], place)
        rows.add(options.rows, {"recipe": name}, row)
        print(json.dumps(row, indent=1), flush=True)


if __name__ == "__main__":
    main()
