"""What all plots look like: colours, and settings of matplotlib."""

from typing import Any

TRAIN, ACCENT, MUTED = "#8fb8de", "#1b4965", "#9a9a9a"
VALID = ("#c8553d", "#588157", "#7b2d8b", "#d4a017")
STYLE: Any = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "axes.edgecolor": "#666666", "axes.labelsize": 9,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "grid.color": "#e6e6e6", "legend.frameon": False, "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "font.size": 9, "lines.linewidth": 1.8,
}  # fmt: skip
