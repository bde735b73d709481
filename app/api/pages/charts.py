"""Charts as inline SVG: lines, bars, the small bars of a tile, and the graph of invalidations.

The style sheets of the pages colour charts by class, for the light and the dark scheme, because the content security
policy forbids inline styles. Each chart is an image with a name for screen readers. Each value has a `<title>`, which
browsers show on hover.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import ceil, floor, log10

from markupsafe import Markup, escape

Series = Mapping[str, Sequence[float | None]]
COLOURS = 4
MOST_LABELS, MOST_STEPS = 6, 5
CHARACTER_PX, LINE_PX, MARGIN_PX = 6.5, 22, 8
LARGEST = 1e300  # so that the difference of two values is finite
SLOT, SLOT_GAP, SLOT_HEIGHT, LEAST_HEIGHT = 4, 1, 40, 1.5
ROW, BOX_HEIGHT, BOX_WIDTH, RIGHT_COLUMN, GRAPH_WIDTH = 46, 34, 200, 330, 560


def lines(
    title: str, labels: Sequence[str], series: Series, *, unit: str = "", width: int = 480, height: int = 190
) -> Markup:
    """A chart of values over time, one line per series; None is a gap."""
    axes = _Axes(labels, series, _known(series), unit, width, height)
    drawn = []
    for values in series.values():
        path, points, pen = "", "", "M"
        for place, value in enumerate(values):
            if value is None:
                pen = "M"
                continue
            at = f"{axes.x(place):.1f} {axes.y(value):.1f}"
            path += f"{pen}{at}h0"  # a line of no length, so that a point between two gaps shows
            pen = "L"
            points += f'<path class="point" d="M{at}h0">{axes.title(place, value)}</path>'
        drawn.append(f'<path d="{path}"/>{points}')
    return axes.chart(drawn, _summary(title, series))


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
    """A chart of bars, side by side or stacked. `spoken` replaces the text for screen readers."""
    totals = [sum(value or 0 for value in column) for column in zip(*series.values(), strict=True)]
    axes = _Axes(labels, series, totals if stacked else _known(series), unit, width, height)
    thick = 0.8 * axes.slot / (1 if stacked else len(series))
    bases = [0.0] * len(labels)
    drawn = []
    for number, values in enumerate(series.values()):
        shift = -0.4 * axes.slot + (0 if stacked else number * thick)
        group = ""
        for place, value in enumerate(values):
            if value is not None:
                top, bottom = sorted((axes.y(bases[place]), axes.y(bases[place] + value)))
                group += (
                    f'<rect x="{axes.x(place) + shift:.1f}" y="{top:.1f}" width="{thick:.1f}" '
                    f'height="{bottom - top:.1f}">{axes.title(place, value)}</rect>'
                )
                bases[place] += value if stacked else 0
        drawn.append(group)
    return axes.chart(drawn, spoken or _summary(title, series))


def slots(title: str, labels: Sequence[str], values: Sequence[float | None], texts: Sequence[str]) -> Markup:
    """A chart of small bars without axes, for a tile of the overview. `texts` are the values as text. None is a gap."""
    known = [(value, text) for value, text in zip(values, texts, strict=True) if value is not None]
    highest, highest_text = max(known, key=lambda item: item[0], default=(0.0, ""))
    highest = highest or 1.0
    drawn = "".join(
        f'<rect x="{place * SLOT}" y="{SLOT_HEIGHT - tall:.1f}" width="{SLOT - SLOT_GAP}" height="{tall:.1f}">'
        f"<title>{escape(label)}: {escape(text)}</title></rect>"
        for place, (label, value, text) in enumerate(zip(labels, values, texts, strict=True))
        if value is not None
        for tall in [LEAST_HEIGHT + (SLOT_HEIGHT - LEAST_HEIGHT) * max(0.0, value / highest)]
    )
    latest = f"latest {known[-1][1]}, highest {highest_text}" if known else "no data yet"
    frame = Markup(
        '<svg class="slots" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    )
    return frame.format(len(values) * SLOT - SLOT_GAP, SLOT_HEIGHT, f"{title}: {latest}", Markup(drawn))  # noqa: S704


def invalidation_graph(features_by_subject: Mapping[str, Sequence[str]], features: Sequence[str]) -> Markup:
    """A graph of event subjects (left) and features (right), with a curve to each feature that a subject affects."""
    height = max(len(features_by_subject), len(features)) * ROW + 12

    def tops(names: Collection[str]) -> dict[str, int]:
        first = (height - len(names) * ROW + ROW - BOX_HEIGHT) / 2
        return {name: round(first + place * ROW) for place, name in enumerate(names)}

    def box(name: str, x: int, y: int, width: int) -> str:
        return (
            f'<g class="node"><rect x="{x}" y="{y}" width="{width}" height="{BOX_HEIGHT}" rx="6"/>'
            f'<text x="{x + 12}" y="{y + 22}">{escape(name)}</text></g>'
        )

    left, right = tops(features_by_subject), tops(features)
    start, middle = 2 + BOX_WIDTH, (2 + BOX_WIDTH + RIGHT_COLUMN) // 2
    drawn = ""
    for subject, names in features_by_subject.items():
        y1 = left[subject] + BOX_HEIGHT // 2
        for name in names:
            y2 = right[name] + BOX_HEIGHT // 2
            drawn += (
                f'<path class="edge" d="M{start} {y1} C{middle} {y1} {middle} {y2} {RIGHT_COLUMN} {y2}">'
                f"<title>{escape(subject)} → {escape(name)}</title></path>"
            )
    drawn += "".join(box(name, 2, y, BOX_WIDTH) for name, y in left.items())
    drawn += "".join(box(name, RIGHT_COLUMN, y, GRAPH_WIDTH - RIGHT_COLUMN - 2) for name, y in right.items())
    spoken = " ".join(
        f"{subject} invalidates {', '.join(names) or 'nothing'}." for subject, names in features_by_subject.items()
    )
    frame = Markup('<svg class="graph" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
    return frame.format(GRAPH_WIDTH, height, spoken, Markup(drawn))  # noqa: S704  # texts in it are escaped


class _Axes:
    """The frame of a chart: a scale that includes zero, with round steps; labels below; a legend for several series."""

    def __init__(
        self, labels: Sequence[str], series: Series, values: Iterable[float], unit: str, width: int, height: int
    ) -> None:
        self._labels, self._names, self._unit = labels, list(series), unit
        self._width, self._height = width, height
        self._low, self._high, self._step = _scale(values)
        steps = round((self._high - self._low) / self._step)
        self._ticks = [self._low + self._step * number for number in range(steps + 1)]
        self._left = MARGIN_PX + CHARACTER_PX * max(len(self._text(tick)) for tick in self._ticks)
        self._bottom = height - LINE_PX * (2 if len(series) > 1 else 1)
        self.slot = (width - self._left - MARGIN_PX) / len(labels)

    def x(self, place: int) -> float:
        """The x coordinate of the label with the index `place`, in the middle of its slot."""
        return self._left + self.slot * (place + 0.5)

    def y(self, value: float) -> float:
        share = (max(-LARGEST, min(LARGEST, value)) - self._low) / (self._high - self._low)
        return self._bottom - share * (self._bottom - MARGIN_PX)

    def title(self, place: int, value: float) -> str:
        return f"<title>{escape(self._labels[place])}: {escape(self._text(value))}</title>"

    def chart(self, drawn: Sequence[str], name: str) -> Markup:
        """The whole chart. `drawn` holds the SVG of each series."""
        groups = "".join(
            f'<g class="series-{number % COLOURS}">{part}{self._legend(number)}</g>'
            for number, part in enumerate(drawn)
        )
        frame = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
        body = Markup(self._grid() + self._labels_below() + groups)  # noqa: S704  # texts in it are escaped
        return frame.format(self._width, self._height, name, body)

    def _grid(self) -> str:
        return "".join(
            f'<path class="grid" d="M{self._left:.1f} {self.y(tick):.1f}H{self._width - MARGIN_PX}"/>'
            f'<text class="y" x="{self._left - 4:.1f}" y="{self.y(tick) + 4:.1f}">{escape(self._text(tick))}</text>'
            for tick in self._ticks
        )

    def _labels_below(self) -> str:
        widest = CHARACTER_PX * (max(map(len, self._labels)) + 1)
        shown = max(1, min(MOST_LABELS, int((self._width - self._left) / widest)))
        return "".join(
            f'<text x="{self.x(place):.1f}" y="{self._bottom + 17:.1f}">{escape(self._labels[place])}</text>'
            for place in range(0, len(self._labels), ceil(len(self._labels) / shown))
        )

    def _legend(self, number: int) -> str:
        if len(self._names) == 1:
            return ""
        x = self._left + number * (self._width - self._left) / len(self._names)
        y = self._height - MARGIN_PX
        return (
            f'<rect x="{x:.1f}" y="{y - 10}" width="10" height="10"/>'
            f'<text class="legend" x="{x + 15:.1f}" y="{y}">{escape(self._names[number])}</text>'
        )

    def _text(self, value: float) -> str:
        whole = value == int(value) and abs(value) < 1e15
        digits = f"{value:,.0f}".replace(",", "\u202f") if whole else f"{value:.3g}"
        return f"{digits} {self._unit}".rstrip()


def _known(series: Series) -> list[float]:
    return [value for values in series.values() for value in values if value is not None]


def _scale(values: Iterable[float]) -> tuple[float, float, float]:
    """Lower end, upper end and tick distance of an axis for these values. Whole numbers get whole distances."""
    clamped = [0.0, *(max(-LARGEST, min(LARGEST, value)) for value in values)]
    low, high = min(clamped), max(clamped)
    if high - low < 1e-9:
        high = low + 1
    rough = (high - low) / MOST_STEPS
    power = 10.0 ** floor(log10(rough))
    step = next((power * factor for factor in (1, 2, 5) if power * factor >= rough), 10 * power)
    if all(value == int(value) for value in clamped):
        step = max(1.0, step)
    return floor(low / step) * step, ceil(high / step) * step, step


def _summary(title: str, series: Series) -> str:
    parts = []
    for name, values in series.items():
        known = [value for value in values if value is not None]
        if known:
            latest = f"latest {values[-1]:.4g}" if values[-1] is not None else "no latest value"
            prefix = "" if name == title else f"{name}: "
            parts.append(f"{prefix}{latest}, lowest {min(known):.4g}, highest {max(known):.4g}")
    return f"{title}. {'; '.join(parts) or 'No data yet'}."
