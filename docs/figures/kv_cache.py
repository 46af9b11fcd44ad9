"""Draw docs/results/kv-cache.svg from docs/results/kv-cache.jsonl: bytes of key/value caches against what they cost.

python docs/figures/kv_cache.py [OUT.svg | OUT.png]
"""

from __future__ import annotations

import json

from matplotlib.figure import Figure
from style import BLUE, DOCS, GRAY, ORANGE, save

MODEL, LENGTH = "smollm2-135m", 2048
"""The model, and the length of windows, of the rows that are drawn."""

LABELS = {
    ("each head, 0.28", "mixed", "sign", "2 to 6 bits"): ("bits of each head", BLUE, (-8, -12), "right"),
    ("each head, 0.24", "mixed", "sign", "2 to 6 bits"): ("", BLUE, (0, 0), "left"),
    ("each head, 0.2", "mixed", "sign", "2 to 6 bits"): ("", BLUE, (0, 0), "left"),
    ("q4_0, Hadamard", "dense", "sign", "4 bits"): ("q4_0, Hadamard", GRAY, (-8, -3), "right"),
    ("KIVI, 4 bits", "dense", "sign", "4 bits"): ("KIVI, 4 bits", GRAY, (8, -4), "left"),
    ("KIVI, 2 bits", "dense", "sign", "2 bits"): ("KIVI, 2 bits", GRAY, (8, -3), "left"),
    ("TurboQuant, 4 bits", "dense", "sign", "4 bits"): ("TurboQuant, 4 bits", GRAY, (-8, 8), "center"),
    ("TurboQuant, 3 bits", "dense", "sign", "3 bits"): ("TurboQuant, 3 bits", GRAY, (8, -3), "left"),
    ("ria", "29:64", "sign", "int8"): ("29:64, int8", BLUE, (-8, -12), "left"),
    ("ria", "24:64", "sign", "int8"): ("24:64, int8", BLUE, (8, 2), "left"),
    ("ria", "2:4", "sign", "int8"): ("2:4, int8", BLUE, (8, 2), "left"),
    ("ria", "2:4", "sign", "bf16"): ("2:4, bf16", BLUE, (8, -3), "left"),
    ("ria", "29:64", "sign", "bf16"): ("29:64, bf16", BLUE, (-8, -3), "right"),
    ("natural order", "2:4", "sign", "int8"): ("2:4, int8, the model's order", ORANGE, (8, -3), "left"),
    ("natural order", "2:4", "zeros", "int8"): ("2:4, int8, the model's order, zeros", ORANGE, (8, -3), "left"),
    ("ThinK", "43:64", "zeros", "int8"): ("ThinK, int8", GRAY, (8, -3), "left"),
    ("Mustafar", "35:64", "zeros", "int8"): ("Mustafar, int8", GRAY, (8, -3), "left"),
    ("SparK", "29:64", "sign", "int8"): ("SparK, int8", GRAY, (8, 2), "left"),
    ("Mustafar", "32:64", "zeros", "bf16"): ("Mustafar, bf16", GRAY, (8, -3), "left"),
    ("SparK", "29:64", "sign", "bf16"): ("SparK, bf16", GRAY, (8, 2), "left"),
    ("int4, groups of 32", "dense", "", "int4"): ("int4, groups of 32", GRAY, (8, -8), "left"),
}
"""What is drawn, by method, pattern, recovery and type: the text, its colour, and where it stands."""


def draw() -> Figure:
    """A point for each method that stores keys and values."""
    lines = (DOCS / "results" / "kv-cache.jsonl").read_text(encoding="utf-8").splitlines()
    picture = Figure(figsize=(9.6, 4.8))
    axes = picture.add_axes((0.09, 0.12, 0.88, 0.84))
    for row in map(json.loads, lines):
        own = LABELS.get((row["method"], row["keys"], row["recovery"], row["stored"]))
        if own is None or row["keys"] != row["values"] or (row["model"], row["length"]) != (MODEL, LENGTH):
            continue
        if row["table"] == "quantised" and row["stored"] == "int8":  # the default pattern once more
            continue
        text, color, offset, place = own
        loss = 100 * (row["factor"] - 1)
        axes.plot(row["bytes"], loss, "o", color=color, markersize=7)
        axes.annotate(
            text, (row["bytes"], loss), offset, textcoords="offset points", ha=place, color=color, fontsize=9.5
        )
    axes.set_yscale("symlog", linthresh=1, linscale=1.6)
    axes.set_ylim(-0.15, 60)
    axes.set_yticks([0, 0.25, 0.5, 1, 2, 5, 10, 20, 50], ["0", "0.25", "0.5", "1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.set_xlim(0.18, 0.74)
    axes.set_xlabel("bytes, relative to a dense bf16 cache", color=GRAY, fontsize=9.5)
    axes.set_ylabel("perplexity lost, %", color=GRAY, fontsize=9.5)
    axes.tick_params(colors=GRAY, labelsize=9.5, length=0)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(GRAY)
    axes.grid(color=GRAY, alpha=0.25)
    axes.set_axisbelow(True)
    return picture


if __name__ == "__main__":
    save(draw(), "results/kv-cache.svg")
