"""Sweeps drawn as SVG files that need no script and nothing from elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pygal
from pygal.style import Style

from tests.bench.timing import Curve

X_LABELS = 11  # more could not be read side by side
_STYLE = Style(
    background="white",
    plot_background="white",
    font_family="sans-serif",
    colors=("#7a7a7a", "#c2571a", "#1f5fa8", "#2e7d32", "#8e44ad", "#b8860b"),
)


def draw(curves: Sequence[Curve], directory: Path) -> list[Path]:
    """Write each into the directory, under its name; the files. Times are drawn in milliseconds."""
    directory.mkdir(parents=True, exist_ok=True)
    return [_draw(curve, directory) for curve in curves]


def _draw(curve: Curve, directory: Path) -> Path:
    scale, unit = (1_000, "milliseconds") if curve.y == "seconds" else (1, curve.y)
    chart: Any = pygal.Line(
        js=[],
        style=_STYLE,
        title=curve.name,
        x_title=curve.x,
        y_title=unit,
        legend_at_bottom=True,
        logarithmic=_is_wide(curve),
        show_x_guides=len(curve.at) <= X_LABELS,
        truncate_label=-1,
        width=860,
        height=500,
        value_formatter=lambda value: f"{value:,.3g}" if value < 1_000 else f"{value:,.0f}",
    )
    every = math.ceil(len(curve.at) / X_LABELS)
    chart.x_labels = [f"{at:,.0f}" if place % every == 0 else "" for place, at in enumerate(curve.at)]
    for name, values in curve.series.items():
        chart.add(name, [value * scale for value in values])
    file = directory / f"{re.sub(r'[^a-z0-9]+', '-', curve.name.lower()).strip('-')}.svg"
    file.write_bytes(chart.render())
    return file


def _is_wide(curve: Curve) -> bool:
    """Whether a linear axis would press most of the values onto the ground."""
    values = [value for line in curve.series.values() for value in line]
    return min(values) > 0 and max(values) > 20 * min(values)
