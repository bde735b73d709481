"""Charts as inline SVG, drawn by pygal.

pygal brings styles and a script inside each drawing. A page's policy allows neither, so they are taken out: the page's
own style sheet colours the drawing by its classes, in light and dark, and each point gets a `<title>`, which browsers
show on hover. Every drawing has a role and a name for people who cannot see it. What it is called is escaped by the
XML writer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pygal
from markupsafe import Markup
from pygal.etree import etree
from pygal.style import Style

# pygal adds a finder of its own for its maps, which are not used here, in a form that Python has given up: each import
# that fails after that would be warned of.
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "pygal"]

Series = Mapping[str, Sequence[float | None]]
_STYLE = Style(
    font_family="inherit", label_font_size=11, major_label_font_size=11, legend_font_size=12, no_data_font_size=14
)


def lines(
    title: str, labels: Sequence[str], series: Series, *, unit: str = "", width: int = 480, height: int = 190
) -> Markup:
    """Lines over time. A None is a gap. About six of the labels are written."""
    chart = pygal.Line(
        **_frame(series, unit, width, height),
        allow_interruptions=True,
        show_dots=True,
        dots_size=2,
        range=_from_zero(series),
    )
    return _drawn(chart, title, labels, series)


def bars(
    title: str,
    labels: Sequence[str],
    series: Series,
    *,
    unit: str = "",
    stacked: bool = False,
    spoken: str | None = None,
    width: int = 480,
    height: int = 190,
) -> Markup:
    """Bars side by side, or one on the other. `spoken` is the drawing's name where the order of bars is not time."""
    chart = (pygal.StackedBar if stacked else pygal.Bar)(**_frame(series, unit, width, height))
    return _drawn(chart, title, labels, series, spoken=spoken)


def _frame(series: Series, unit: str, width: int, height: int) -> dict[str, Any]:
    """What every chart has: axes with few labels, and a legend in one line where there is more than one series."""
    return {
        "style": _STYLE,
        "js": (),
        "css": (),
        "no_data_text": "nothing yet",
        "truncate_label": -1,
        "width": width,
        "height": height,
        "show_legend": len(series) > 1,
        "legend_at_bottom": True,
        "legend_at_bottom_columns": max(1, len(series)),
        "legend_box_size": 10,
        "show_minor_x_labels": False,
        "margin": 6,
        "spacing": 8,
        "max_scale": 5,
        "value_formatter": _formatter(unit),
    }


def _from_zero(series: Series) -> tuple[float, float] | None:
    known = [value for values in series.values() for value in values if value is not None]
    if not known:
        return None
    return min(0.0, *map(_drawable, known)), max(map(_drawable, known)) or 1.0


def _drawable(value: float) -> float:
    """The value, or 0 where it is too small for pygal to divide by its power of ten."""
    return float(value) if abs(value) > sys.float_info.min else 0.0


def _formatter(unit: str) -> Callable[[float], str]:
    def text(value: float) -> str:
        digits = f"{value:,.0f}" if value == int(value) else f"{value:.3g}"
        return f"{digits} {unit}".rstrip()

    return text


def _drawn(chart: Any, title: str, labels: Sequence[str], series: Series, *, spoken: str | None = None) -> Markup:
    if all(value is None or value == int(value) for values in series.values() for value in values):
        chart.config.order_min = 0  # no halves of what is counted
    chart.x_labels = [str(label) for label in labels]
    every = max(1, -(-len(labels) // 6))
    chart.x_labels_major_every = every
    for name, values in series.items():
        chart.add(str(name), [None if value is None else _drawable(value) for value in values])
    root = chart.render_tree()
    _strip(root)
    _name_points(root)
    root.set("class", "chart")
    root.set("role", "img")
    root.set("aria-label", spoken or _spoken(title, series))
    root.attrib.pop("id", None)
    text: str = etree.tostring(root, encoding="unicode")
    return Markup(text)  # noqa: S704  # written by an XML writer, which escapes


def _spoken(title: str, series: Series) -> str:
    parts = []
    for name, values in series.items():
        known = [value for value in values if value is not None]
        if known:
            latest = values[-1]
            said = f"latest {latest:.4g}" if latest is not None else "no latest value"
            prefix = "" if name == title else f"{name}: "
            parts.append(f"{prefix}{said}, lowest {min(known):.4g}, highest {max(known):.4g}")
    return f"{title}. {'; '.join(parts) or 'Nothing to show yet'}."


def _strip(root: Any) -> None:
    """Take out styles, scripts, comments, the title of pygal and what only its script would use."""
    for parent in list(root.iter()):
        for child in list(parent):
            tag = child.tag if isinstance(child.tag, str) else ""
            name = tag.rpartition("}")[2]
            unused = child.get("class", "") in ("plot text-overlay", "plot tooltip-overlay", "background")
            if (
                not tag
                or name in ("style", "script")
                or (parent is root and name in ("defs", "title"))
                or unused
                or child.get("class", "").startswith("tooltip ")
            ):
                parent.remove(child)
            else:
                child.attrib.pop("style", None)
                child.attrib.pop("id", None)


def _name_points(root: Any) -> None:
    """What pygal notes beside a point for its script becomes the point's title."""
    for group in list(root.iter()):
        notes = {
            child.get("class"): child
            for child in group
            if isinstance(child.tag, str) and child.tag.rpartition("}")[2] == "desc"
        }
        if not notes:
            continue
        value = notes["value"].text or "" if "value" in notes else ""
        label = notes["x_label"].text or "" if "x_label" in notes else ""
        for note in notes.values():
            group.remove(note)
        if value and len(group):
            title = etree.SubElement(group[0], "title")
            title.text = f"{label}: {value}" if label else value
