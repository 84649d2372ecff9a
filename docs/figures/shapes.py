"""Colours and shapes of the figures: tokens, arrows, legends."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.textpath import TextPath

CONTEXT, ACCEPTED, OWN, REJECTED = "#e9ecf1", "#cfe8d5", "#fde2b8", "#f7d6d6"
EDGE = {CONTEXT: "#8a94a6", ACCEPTED: "#3d8b57", OWN: "#c47f17", REJECTED: "#b4494b"}
INK, BLUE = "#1f2733", "#34558b"


def canvas(width: float, height: float, x: float, y: float) -> tuple[Figure, Axes]:
    """A figure of inches, with axes without frame from 0 to ``x`` and ``y``."""
    figure = Figure((width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, x), ylim=(0, y))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, place: tuple[float, float], width: float, height: float, fill: str, **style: object) -> None:
    """A rectangle with round corners."""
    options = {"facecolor": fill, "edgecolor": EDGE.get(fill, INK), "linewidth": 0.7, "rounding": 0.05} | style
    corners = f"round,pad=0,rounding_size={options.pop('rounding')}"
    axes.add_patch(FancyBboxPatch(place, width, height, boxstyle=corners, **options))


def cell(axes: Axes, x: float, y: float, text: str, fill: str, **style: object) -> None:
    """A token."""
    box(axes, (x, y), 0.92, 0.62, fill, **({"rounding": 0.09, "linewidth": 0.9} | style))
    axes.text(x + 0.46, y + 0.3, text, ha="center", va="center_baseline")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: object) -> None:
    options = {"arrowstyle": "-|>", "mutation_scale": 9, "color": INK, "linewidth": 1.0, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, **(options | style)))


def legend(axes: Axes, x: float, y: float, entries: Sequence[tuple[str, str]], size: float = 7.5) -> None:
    """Colours and what they mean, in a row."""
    units = axes.get_xlim()[1] / axes.figure.get_figwidth() / 72
    for text, fill in entries:
        box(axes, (x, y), 0.36, 0.34, fill)
        axes.text(x + 0.5, y + 0.16, text, va="center", size=size)
        x += 1.1 + TextPath((0, 0), text, size=size).get_extents().width * units
