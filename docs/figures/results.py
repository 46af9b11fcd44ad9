"""Draw docs/results/gap-closed.svg from docs/results/protocol.jsonl: how much of the gap each permuter closes.

python docs/figures/results.py [OUT.svg | OUT.png]
"""

from __future__ import annotations

from matplotlib.figure import Figure
from style import BLUE, GRAY, ORANGE, save
from tables import gap_closed, protocol


def draw() -> Figure:
    """A bar for each permuter and text, in both modes."""
    picture = Figure(figsize=(9.6, 4.0))
    for place, mode in enumerate(("fold", "gather")):
        axes = picture.add_axes((0.12 + 0.48 * place, 0.12, 0.36, 0.72))
        found = [row for row in protocol("2:4", mode) if row["method"] != "none"]
        for offset, text, color in ((-0.2, "wikitext2", BLUE), (0.2, "held back", ORANGE)):
            closed = [100 * gap_closed(row, text) for row in found]
            axes.barh([number + offset for number in range(len(found))], closed, 0.36, color=color)
        axes.set_yticks(range(len(found)), [row["method"].partition(":")[0] for row in found])
        axes.set_ylim(6.6, -0.6)
        axes.set_xlim(0, 70)
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
        (0.12, "WikiText-2 raw", BLUE),
        (0.3, "C4, other documents than those of the calibration", ORANGE),
    ):
        picture.text(x, 0.94, name, color=color, fontsize=10)
    return picture


if __name__ == "__main__":
    save(draw(), "results/gap-closed.svg")
