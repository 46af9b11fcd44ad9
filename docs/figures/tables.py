"""Write the tables of docs/results/, docs/recipes/, docs/index.md and README.md from the committed rows.

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`.

python docs/figures/tables.py            # after a change of rows
python docs/figures/tables.py --check    # exit status 1 if a page differs from its rows
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end table -->)", re.DOTALL)

Row = dict[str, Any]

LISTS = json.loads(Path(__file__).with_name("lists.json").read_text(encoding="utf-8"))
"""Tables with a line for each row: the file of the rows, the heads, and the cells, empty where a row has no value.

`table` is that of the rows, if it has another name, and `where` are the values of those that are shown, if not all are.
"""


class Fields(dict[str, Any]):
    """The values of a row, and their quotients by each other and by numbers: `a/b`, `a/1e6`."""

    def __missing__(self, name: str) -> float:
        value, slash, divisor = name.partition("/")
        if not slash:
            raise KeyError(name)
        return float(self[value]) / float(self.get(divisor, divisor))


def filled(template: str, row: Row) -> str:
    """The template with the values of a row; empty if it lacks one."""
    try:
        return template.format_map(Fields({name: value for name, value in row.items() if value is not None}))
    except (KeyError, TypeError):
        return ""


def listed(name: str) -> str:
    own = LISTS[name]
    shown = own.get("where", {})
    found = [row for row in rows(own["rows"]) if row.get("table", name) == own.get("table", name)]
    found = [row for row in found if all(row[key] in values for key, values in shown.items())]
    cells = re.split(r" ?\| ", own["cells"])
    return markdown(own["heads"], ([filled(cell, row) for cell in cells] for row in found))


def rows(name: str, **values: Any) -> list[Row]:
    """The rows of a file in docs/results/ that have these values."""
    lines = (RESULTS / name).read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if values.items() <= row.items()]


def markdown(heads: str, lines: Iterable[Sequence[object]]) -> str:
    """A table; `heads` are separated by " | ". In the first column a cell that repeats the one above it is empty."""
    body, last = [f"| {heads} |", "|---" * (heads.count(" | ") + 1) + "|"], ""
    for first, *others in lines:
        body.append("| " + " | ".join(["" if first == last else str(first), *map(str, others)]) + " |")
        last = str(first)
    text = "\n".join(body)
    return re.sub(r"(?<![\w.-])-(?=\d)", "\N{MINUS SIGN}", re.sub(r"(?<=\d)%", " %", text))


def mean_of(shares: Sequence[float], digits: int = 1) -> str:
    """The mean in percent, and the standard deviation if they differ."""
    deviation = f" ± {100 * statistics.stdev(shares):.{digits}f}" if len(set(shares)) > 1 else ""
    return f"{100 * statistics.mean(shares):.{digits}f}{deviation}"


def with_error(value: float, error: float) -> str:
    return f"{100 * value:.1f} ± {100 * error:.1f}"


TEXTS = ("wikitext2", "held back")
C4, BOTH = "c4_sample_700.jsonl", "c4_and_wikitext2_valid.jsonl"
"""The texts of calibrations."""
ORDER = ("none", "ria", "cp", "reconstruction", "learned-paper", "permllm", "newton", "learned")


def perplexity(row: Row, text: str) -> float:
    return float(row["texts"][text]["value"])


def gap_closed(row: Row, text: str) -> float:
    """The share of the log-perplexity gap between the dense model and no permutation, of the row's pattern and seed."""
    (dense,) = rows("protocol.jsonl", method="dense", calibration=row["calibration"])
    same = {name: row[name] for name in ("calibration", "pattern", "seed")}
    (none,) = rows("protocol.jsonl", method="none", **same)
    lost, most = (math.log(perplexity(other, text) / perplexity(dense, text)) for other in (row, none))
    return 1 - lost / most


def protocol(pattern: str, mode: str, calibration: str = C4) -> list[Row]:
    """The rows of `none` and of the methods, in the order of ORDER."""
    same = {"pattern": pattern, "seed": 0, "calibration": calibration}
    found = rows("protocol.jsonl", mode=mode, **same) + rows("protocol.jsonl", method="none", **same)
    return sorted(found, key=lambda row: ORDER.index(row["method"].partition(":")[0]))


def searched(row: Row, digits: int = 2, share_digits: int = 1) -> list[str]:
    """The method, and perplexity and share of the gap closed on each text; `newton` in bold type."""
    cells = [row["method"]]
    for text in TEXTS:
        share = 1.0 if row["method"] == "dense" else gap_closed(row, text)
        cells += [f"{perplexity(row, text):.{digits}f}", f"{share:.{share_digits}%}"]
    return [f"**{cell}**" for cell in cells] if row["method"] == "newton" else cells


PROTOCOL_HEADS = "method | WikiText-2 raw | gap closed | C4, other documents | gap closed"


def protocol_fold() -> str:
    found = rows("protocol.jsonl", method="dense", calibration=C4) + protocol("2:4", "fold")
    costs = ([row[name] for name in ("core_seconds", "peak")] if "mode" in row else ["", ""] for row in found)
    lines = ([*searched(row), *cost] for row, cost in zip(found, costs, strict=True))
    return markdown(f"{PROTOCOL_HEADS} | core-seconds | peak MiB", lines)


def protocol_others() -> str:
    shown = (("2:4", "gather"), ("4:8", "fold"), ("4:8p", "fold"), ("6:8", "fold"), ("6:8", "gather"))
    cells = [(f"{pattern}, {mode}", row) for pattern, mode in shown for row in protocol(pattern, mode)
             if mode == "fold" or row["method"] != "none"]  # fmt: skip
    cells += [("6:8, fold, both texts", row) for row in protocol("6:8", "fold", BOTH) if row["method"] != "none"]
    lines = ([label, *searched(row)] for label, row in cells)
    return markdown(f"pattern, mode | {PROTOCOL_HEADS}", lines)


def readme() -> str:
    found = rows("protocol.jsonl", method="dense", calibration=C4) + protocol("2:4", "fold")
    gather = next(row for row in protocol("2:4", "gather") if row["method"] == "newton")
    lines: list[list[object]] = []
    for row in [*found, gather | {"method": "newton, gather mode"}]:
        minutes = f"{row['core_seconds'] / 60:.2g}" if "mode" in row else ""
        lines += [] if "paper" in row["method"] else [[*searched(row, 1, 0), minutes]]
    for mode in ("fold", "gather"):
        trained = rows("training.jsonl", table="trained", mode=mode)
        best = max(trained, key=lambda row: row["gap_wikitext2"] + row["gap_c4"])
        cells = [(f"{math.exp(best['nll_' + text]):.1f}", f"{best['gap_' + text]:.0%}") for text in ("wikitext2", "c4")]
        lines.append([f"trained, {mode} mode", *itertools.chain(*cells), best["minutes"]])
    return markdown(f"{PROTOCOL_HEADS} | core-minutes", lines)


RECIPES = {
    "smollm2-135m": ("small language model", "SmolLM2-135M", "language-model"),
    "qwen2.5-coder-1.5b": ("language model of 1 to 2 B", "Qwen2.5-Coder-1.5B", "large-language-model"),
    "minilm-l6": ("sentence embeddings", "MiniLM-L6", "embeddings"),
    "minilm-sst2": ("text classifier", "MiniLM-L6 on SST-2", "text-classifier"),
    "vit-s14": ("image classifier", "ViT-S/14 on CIFAR-10", "image-classifier"),
    "clip-vit-b16": ("image classifier", "CLIP ViT-B/16 on CIFAR-10", "image-classifier"),
    "llava": ("vision-language model", "CLIP and SmolLM2", "vision-language"),
    "whisper-tiny-en": ("speech recognition", "Whisper tiny.en", "speech"),
}
"""The kind of each recipe, its model, and its page."""

MODELS_OF_RECIPES = ("dense", "plain", "pruned")


def home() -> str:
    """A line for each recipe: the first of its measures, its minutes, bytes and speed."""
    lines = []
    for name, (kind, model, page) in RECIPES.items():
        link = f"[{kind}](recipes/{page}.md)"
        for row in rows("recipes.jsonl", recipe=name):
            measure, (first, *_), sizes = row["measures"][0], row["speeds"], row["bytes"]
            values = [reading(measure, measure[one]) for one in MODELS_OF_RECIPES]
            speed = f"{first['pruned'] / first['dense']:.2f}"
            size = f"{sizes['pruned'] / 1e6:.0f}, {sizes['dense'] / 1e6:.0f}"
            lines.append([link, model, measure["title"], *values, f"{row['minutes']:.0f}", size, speed])
    heads = "kind | model | measured | dense | plain 2:4 | pruned | core-minutes | MB, pruned and dense | speed / dense"
    return markdown(heads, lines)


def reading(measure: Row, value: float) -> str:
    """A value of a measure: a share in percent, a perplexity or a correlation as it is."""
    return f"{value:.1%}" if measure["unit"] == "share" else f"{value:.{1 if measure['unit'] == 'perplexity' else 3}f}"


def recipes(page: str) -> str:
    """The measures, bytes and speeds of the recipes of a page, and what they cost."""
    lines: list[Sequence[object]] = []
    for name, (_, model, own) in RECIPES.items():
        for row in rows("recipes.jsonl", recipe=name) if own == page else []:
            for measure in row["measures"]:
                values = [reading(measure, measure[one]) for one in MODELS_OF_RECIPES]
                lines.append([model, measure["title"], *values])
            dense, pruned = (f"{row['bytes'][one] / 1e6:.0f}" for one in ("dense", "pruned"))
            lines.append([model, "MB (dense: bf16)", dense, "", pruned])
            for speed in row["speeds"]:
                ratio = f"{speed['pruned'] / speed['dense']:.2f}"
                lines.append([model, f"speed ({row['speed']}), batch {speed['batch']}", "1", "", ratio])
            lines.append([model, "core-minutes; peak memory, GB", "", "", cost(row)])
    return markdown("model | measured | dense | plain 2:4 | pruned", lines)


def cost(row: Row) -> str:
    return f"{row['minutes']:.0f}; {row['peak_memory_mb'] * 2**20 / 1e9:.1f}"


def zero_shot() -> str:
    lines = []
    for method, name in (("dense", "dense"), ("newton:rounds=5:train=0.93", "2:4, search and training")):
        found = rows("zeroshot.jsonl", model="smollm2-135m", method=method)
        values = [row["value"] for row in found]
        errors = [math.sqrt(row["value"] * (1 - row["value"]) / (row["count"] - 1)) for row in found]
        mean = with_error(statistics.mean(values), math.hypot(*errors) / len(errors))
        lines.append([name, *map(with_error, values, errors), mean])
    return markdown(" | ".join(["model", *(row["task"] for row in found), "mean"]), lines)


MODELS = {
    "whisper-tiny-en": ("Whisper tiny.en, word error rate", "speech-b"),
    "vit-s14-cifar10": ("ViT-S/14, accuracy", "default data"),
    "vit-b16-cifar10": ("ViT-B/16, accuracy", "default data"),
}
"""The title of a model, and the data on which it is measured."""


def models_orders() -> str:
    lines = []
    for model, (title, data) in MODELS.items():
        for method in ("dense", "none", "ria", "newton"):
            own = [row for row in rows("models.jsonl", model=model) if row["method"].partition(":")[0] == method]
            names = ", ".join(dict.fromkeys(row["method"] for row in own)).replace(f", {method}:rounds=", ", ")
            cells = [title, names]
            found = [row for row in own if row["pattern"] == "2:4"]
            cells += [mean_of([row["value"][data] for row in found])]
            cells += [mean_of([row["gap"][data] for row in found], 0)]
            lines.append(cells)
    return markdown("model | method | 2:4, % | gap closed, %", lines)


GLUE = {
    "cola": "CoLA (Matthews)", "sst2": "SST-2 (accuracy)", "rte": "RTE (accuracy)", "stsb": "STS-B (Pearson, Spearman)",
    "mnli": "MNLI (accuracy)", "boolq": "BoolQ (accuracy)", "cb": "CB (accuracy, F1)", "wic": "WiC (accuracy)",
}  # fmt: skip


def glue(pattern: str) -> str:
    """Means over the seeds with their standard errors; those of the dense models are over the examples."""
    columns, dense = [], 0.0
    for method in ("dense", "none", "ria", "newton:rounds=4", "newton:rounds=4+finetune"):
        found = [row for row in rows("glue.jsonl", method=method) if row.get("pattern", pattern) == pattern]
        pairs = []
        for task in GLUE:
            metrics = [row["values"].values() for row in found if row["task"] == task]
            scores = [statistics.mean(value for value, _ in values) for values in metrics]
            of_examples = statistics.mean(error or 0.0 for _, error in metrics[0])
            error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else of_examples
            pairs.append((statistics.mean(scores), error))
        values, errors = zip(*pairs, strict=True)
        mean = statistics.mean(values)
        cells = [with_error(*pair) for pair in [*pairs, (mean, math.hypot(*errors) / len(errors))]]
        dense = dense or mean
        columns.append([*cells, f"{mean / dense:.1%}"])
    names = [*GLUE.values(), "mean", "of the dense mean"]
    lines = zip(names, *columns, strict=True)
    return markdown("task | dense | none | ria | newton:rounds=4 | then training", lines)


def kv_rivals() -> str:
    """The caches that take no more bytes than the default, with the paired difference to it."""
    found = rows("kv-cache.jsonl", model="smollm2-135m", length=2048)
    default = next(row for row in found if (row["method"], row["keys"], row["stored"]) == ("ria", "29:64", "int8"))
    kept = [row for row in found if row["table"] in ("rivals", "int4") or row is default]
    found = sorted((row for row in kept if row["bytes"] <= default["bytes"]), key=lambda row: row["factor"])
    lines = []
    for row in found:
        logs = [math.log(a / b) for a, b in zip(row["of_windows"], default["of_windows"], strict=True)]
        difference = f"{statistics.mean(logs):.4f} ± {statistics.stdev(logs) / len(logs) ** 0.5:.4f}"
        own = row | {"method": "permprune"} if row["method"] == "ria" else row
        cells = filled("{method} | {keys} | {recovery} | {stored} | {factor:.4f}", own).split(" | ")
        lines.append([*cells, "" if row is default else difference, f"{row['bytes']:.3f}"])
    return markdown("method | pattern | recovery | stored | perplexity / dense | difference | bytes / dense", lines)


def few_bits(model: str) -> str:
    """The caches in few bits of a model by their bytes, and how many of the hidden sentences are found with them."""
    lines, lengths = [], sorted({row["tokens"] for row in rows("kv-retrieval.jsonl", model=model)})
    found = [{"method": "dense", "keys": "", "bytes": 1.0}, *rows("kv-cache.jsonl", table="quantised", model=model)]
    for row in sorted(found, key=lambda row: -float(row["bytes"])):
        name = row["method"].replace("each head", "permprune").replace("ria", f"permprune, {row['keys']}")
        cells = [filled(cell, row) for cell in ("{bytes:.3f}", "{factor:.4f} ± {stderr:.4f}", "{kl:.4f}", "{top1:.1%}")]
        for tokens in lengths:
            own = {"model": model, "tokens": tokens, "method": row["method"], "keys": row["keys"]}
            cells.append(next(map(retrieved, rows("kv-retrieval.jsonl", **own)), ""))
        lines.append([name, *cells])
    found_in = " | ".join(f"found in {tokens} tokens" for tokens in lengths)
    return markdown(f"cache | bytes | perplexity / dense | KL | top-1 | {found_in}", lines)


def max_loss() -> str:
    """Mixes with the fewest weights within a loss, and what they lose on examples that the runs never saw."""
    lines = []
    for row in rows("budgets.jsonl", table="max-loss"):
        cells = ("{model}", "{seed}", "{keep:.2f}", "{dense:.1%}", "{pruned:.1%}", "{loss:.2%}")
        lines.append([filled(cell, row) for cell in cells])
    return markdown("model | seed | weights kept | dense | pruned | lost", lines)


def retrieved(row: Row) -> str:
    """The mean accuracy over the tasks of the dense cache; of others the difference to it in points."""
    if row["difference"] is None:
        return f"{statistics.mean(row['accuracy'].values()):.0%}"
    differences, errors = zip(*row["difference"].values(), strict=True)
    return f"{statistics.mean(differences):+.1f} ± {math.hypot(*errors) / len(errors):.1f}"


def trainings() -> str:
    """The shares of the gap that each training closes on both texts, by the seconds that it takes, in its order."""
    found, lines = rows("training.jsonl", table="trainings"), list[list[str]]()
    budgets = sorted({row["seconds"] for row in found} - {0})

    def shares(row: Row) -> str:
        return f"{100 * row['gap_c4']:.1f} / {row['gap_wikitext2']:.1%}"

    for start in dict.fromkeys(row["start"] for row in found):
        own = [row for row in found if row["start"] == start]
        (before,) = (shares(row) for row in own if not row["seconds"])
        for training in dict.fromkeys(row["training"] for row in own if row["seconds"]):
            by_budget = {row["seconds"]: shares(row) for row in own if row["training"] == training}
            lines.append([f"`{start}`: {before}", training, *(by_budget.get(one, "") for one in budgets)])
    return markdown(" | ".join(["before training", "training", *(f"{one} core-seconds" for one in budgets)]), lines)


TABLES: dict[str, Callable[[], str]] = {
    "protocol-fold": protocol_fold,
    "protocol-others": protocol_others,
    "readme": readme,
    "home": home,
    "zero-shot": zero_shot,
    "models-orders": models_orders,
    "glue-2-4": lambda: glue("2:4"),
    "kv-rivals": kv_rivals,
    "few-bits": lambda: few_bits("smollm2-135m"),
    "few-bits-qwen": lambda: few_bits("qwen2.5-coder-1.5b"),
    "max-loss": max_loss,
    "trainings": trainings,
    **{f"recipe-{page}": functools.partial(recipes, page) for _, _, page in RECIPES.values()},
}
"""The other tables."""


def written(text: str) -> str:
    """The text of a page with the tables of the rows. Raises `KeyError` for a table of an unknown name."""
    return PLACE.sub(lambda place: f"{place[1]}\n{table(place[2])}\n\n{place[3]}", text)


def table(name: str) -> str:
    return TABLES[name]() if name in TABLES else listed(name)


def pages() -> list[Path]:
    folders = RESULTS, ROOT / "docs" / "recipes"
    return [
        *(page for folder in folders for page in sorted(folder.glob("*.md"))),
        ROOT / "docs" / "index.md",
        ROOT / "README.md",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page would change")
    options = parser.parse_args()
    texts = {page: page.read_text(encoding="utf-8") for page in pages()}
    found = [page for page, text in texts.items() if text != written(text)]
    for page in found:
        print(page.relative_to(ROOT))
        if not options.check:
            page.write_text(written(texts[page]), encoding="utf-8")
    if options.check and found:
        sys.exit("these pages differ from their rows: run python docs/figures/tables.py")


if __name__ == "__main__":
    main()
