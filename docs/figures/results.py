"""Draw docs/results/gap-closed.svg from docs/results/quality.jsonl: how much of the gap each permuter closes.

python docs/figures/results.py [OUT.svg | OUT.png]
"""

from __future__ import annotations

import json
from typing import Any

from matplotlib.figure import Figure
from style import BLUE, DOCS, GRAY, ORANGE, save

METHODS = ("random", "ria", "cp", "permllm", "learned-paper", "reconstruction", "newton", "learned")


def rows(mode: str) -> dict[str, dict[str, Any]]:
    """The rows of Wanda masks at 2:4 in a mode, by method without its options, the first of each."""
    path = DOCS / "results" / "quality.jsonl"
    found = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    chosen = [row for row in found if (row["pattern"], row["mask"], row["mode"]) == ("2:4", "wanda", mode)]
    return {row["method"].partition(":")[0]: row for row in reversed(chosen)}


def draw() -> Figure:
    """A bar for each permuter and text, in both modes."""
    picture = Figure(figsize=(9.6, 4.0))
    for place, mode in enumerate(("fold", "gather")):
        axes = picture.add_axes((0.12 + 0.46 * place, 0.1, 0.4, 0.74))
        found = rows(mode)
        for offset, text, color in ((-0.2, "wiki.test.tokens", BLUE), (0.2, "c4_sample_700.jsonl", ORANGE)):
            closed = [100 * found[method]["gap"][text] for method in METHODS]
            at = [-number - offset for number in range(len(METHODS))]
            axes.barh([-y for y in at], closed, 0.36, color=color)
        axes.set_yticks(range(len(METHODS)), METHODS if place == 0 else [""] * len(METHODS))
        axes.invert_yaxis()
        axes.set_xlim(-8, 90)
        axes.set_title(f"{mode} mode", color=GRAY, fontsize=11, weight="bold", loc="left")
        axes.set_xlabel("share of the gap closed, %", color=GRAY, fontsize=9.5)
        axes.tick_params(colors=GRAY, labelsize=9.5, length=0)
        for name, spine in axes.spines.items():
            spine.set_visible(name == "left")
            spine.set_color(GRAY)
        axes.spines["left"].set_position(("data", 0))
        axes.grid(axis="x", color=GRAY, alpha=0.25)
        axes.set_axisbelow(True)
    for x, name, color in (
        (0.12, "WikiText-2 (the calibration data's domain)", BLUE),
        (0.47, "C4 (another domain)", ORANGE),
    ):
        picture.text(x, 0.94, name, color=color, fontsize=10)
    return picture


if __name__ == "__main__":
    save(draw(), "results/gap-closed.svg")
