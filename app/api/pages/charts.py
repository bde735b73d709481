"""The geometry and the texts of charts. `templates/charts.html` draws the charts with them."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from math import ceil, floor, log10

Series = Mapping[str, Sequence[float | None]]
MOST_LABELS, MOST_STEPS = 6, 5
CHARACTER_PX, LINE_PX, MARGIN_PX = 6.5, 22, 8
LARGEST = 1e300  # so that the difference of two values is finite


class Axes:
    """The axes of a chart: a scale that includes zero, with round steps, and labels below. Lengths are in pixels."""

    def __init__(
        self, labels: Sequence[str], series: Series, unit: str, width: int, height: int, *, stacked: bool = False
    ) -> None:
        self.labels, self.width, self.height = labels, width, height
        self._unit = unit
        columns = zip(*series.values(), strict=True) if stacked else ([value] for value in chain(*series.values()))
        self._low, self._high, step = _scale(sum(value or 0 for value in column) for column in columns)
        self.ticks = [self._low + step * number for number in range(round((self._high - self._low) / step) + 1)]
        self.left = MARGIN_PX + CHARACTER_PX * max(len(self.text(tick)) for tick in self.ticks)
        self.right = width - MARGIN_PX
        self.bottom = height - LINE_PX * (2 if len(series) > 1 else 1)
        self.slot = (self.right - self.left) / len(labels)
        widest = CHARACTER_PX * (max(map(len, labels)) + 1)
        shown = max(1, min(MOST_LABELS, int((width - self.left) / widest)))
        self.labelled = range(0, len(labels), ceil(len(labels) / shown))

    def x(self, index: int) -> float:
        """The x coordinate of the label with this index: the middle of the column above it."""
        return self.left + self.slot * (index + 0.5)

    def y(self, value: float) -> float:
        share = (max(-LARGEST, min(LARGEST, value)) - self._low) / (self._high - self._low)
        return self.bottom - share * (self.bottom - MARGIN_PX)

    def text(self, value: float) -> str:
        whole = value == int(value) and abs(value) < 1e15
        digits = f"{value:,.0f}".replace(",", "\u202f") if whole else f"{value:.3g}"
        return f"{digits} {self._unit}".rstrip()


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


def summary(title: str, series: Series) -> str:
    """The text of a chart for screen readers: the latest, the lowest and the highest value of each series."""
    parts = []
    for name, values in series.items():
        known = [value for value in values if value is not None]
        if known:
            latest = f"latest {values[-1]:.4g}" if values[-1] is not None else "no latest value"
            prefix = "" if name == title else f"{name}: "
            parts.append(f"{prefix}{latest}, lowest {min(known):.4g}, highest {max(known):.4g}")
    return f"{title}. {'; '.join(parts) or 'No data yet'}."
