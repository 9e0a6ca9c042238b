"""How the report's pictures look: colours and matplotlib's settings."""

from __future__ import annotations

import matplotlib as mpl

mpl.use("Agg")

INK = "#1f2933"
GRID = "#d9dee3"
COLOURS = ("#2563a8", "#d1762c", "#3a8f5c", "#8a4fa3", "#c2a01e", "#6b7280", "#2a9d9d", "#b56a8f")
LOST = "#b3373f"

STYLE = {
    "figure.dpi": 110,
    "font.size": 9.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
