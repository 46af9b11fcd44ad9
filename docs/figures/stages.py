"""Draw docs/stages.svg: the stages from a model to a checkpoint.

python docs/figures/stages.py [OUT.svg | OUT.png]
"""

from __future__ import annotations

from matplotlib.figure import Figure
from style import BLUE, GRAY, GREEN, ORANGE, arrow, box, canvas, save

STAGES = (
    ("coupling", "which channels\nmust move together", GRAY),
    ("calibration", "what flows into\neach layer", GRAY),
    ("saliency", "how much each\nweight matters", GRAY),
    ("permuters", "the order of channels\nthat loses least", BLUE),
    ("pruning", "masks, and the\nstored form", GRAY),
    ("updates, training", "the weights\nthat stay", ORANGE),
    ("fold, write", "the order goes\ninto the weights", GREEN),
)
WIDTH, GAP, ROW = 2.75, 0.6, 4


def place(number: int) -> tuple[float, float]:
    """The lower left corner of a box; the second row comes back from the right."""
    row, column = divmod(number, ROW)
    column = column if row == 0 else ROW - 1 - column
    return 0.25 + column * (WIDTH + GAP), 1.95 - 1.75 * row


def draw() -> Figure:
    """Two rows of stages, with what goes in and what comes out."""
    picture, axes = canvas(13.4, 3.6)
    axes.text(0.25, 3.4, "model + calibration data", color=GRAY, fontsize=10, weight="bold", va="center")
    for number, (name, detail, color) in enumerate(STAGES):
        x, y = place(number)
        box(axes, x, y, WIDTH, 1.0, "", color=color)
        axes.text(x + WIDTH / 2, y + 0.78, name, color=color, fontsize=10, weight="bold", ha="center", va="center")
        axes.text(x + WIDTH / 2, y + 0.36, detail, color=color, fontsize=8.5, ha="center", va="center")
    for number in range(len(STAGES) - 1):
        (x, y), (nx, ny) = place(number), place(number + 1)
        if y != ny:
            arrow(axes, (x + WIDTH / 2, y), (x + WIDTH / 2, ny + 1.02))
        elif nx > x:
            arrow(axes, (x + WIDTH, y + 0.5), (nx - 0.03, y + 0.5))
        else:
            arrow(axes, (x, y + 0.5), (nx + WIDTH + 0.03, y + 0.5))
    x, y = place(len(STAGES) - 1)
    arrow(axes, (x, y + 0.5), (x - 0.57, y + 0.5), GREEN)
    result = {"color": GREEN, "fontsize": 10, "weight": "bold", "ha": "right", "va": "center"}
    axes.text(x - 0.7, y + 0.5, "checkpoint,\nrecord, report", **result)
    arrow(axes, (1.6, 3.24), (1.6, 2.98))
    return picture


if __name__ == "__main__":
    save(draw(), "stages.svg")
