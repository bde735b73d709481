"""Small charts for tiles: a bar for each slot of time, drawn here and not by pygal.

The overview has more than a dozen of them and is drawn anew every ten seconds: pygal takes 7 ms for each, this a
fiftieth of that. A value of nothing is a thin bar; where nothing is known there is none: a gap is not a zero.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

STEP, GAP, HEIGHT, LEAST = 4, 1, 40, 1.5


def slots(title: str, labels: Sequence[str], values: Sequence[float | None], said: Sequence[str]) -> Markup:
    """The bars. `said` is each value as text: it shows on hover, and the chart's name tells the latest and the most."""
    known = [(value, text) for value, text in zip(values, said, strict=True) if value is not None]
    most, most_said = max(known, key=lambda item: item[0], default=(0.0, ""))
    most = most or 1.0
    bars = "".join(
        f'<rect x="{number * STEP}" y="{HEIGHT - (tall := LEAST + (HEIGHT - LEAST) * max(0.0, value / most)):.1f}" '
        f'width="{STEP - GAP}" height="{tall:.1f}"><title>{escape(label)}: {escape(text)}</title></rect>'
        for number, (label, value, text) in enumerate(zip(labels, values, said, strict=True))
        if value is not None
    )
    latest = f"latest {known[-1][1]}, highest {most_said}" if known else "nothing to show yet"
    frame = Markup(
        '<svg class="slots" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    )
    return frame.format(len(values) * STEP - GAP, HEIGHT, f"{title}: {latest}", Markup(bars))  # noqa: S704  # escaped
