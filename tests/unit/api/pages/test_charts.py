"""Charts as SVG: well-formed, escaped, to scale, with gaps for missing values and an accessible name."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from xml.etree import ElementTree as ET

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markupsafe import Markup

from app.api.pages.templating import environment

CHARTS = environment().get_template("charts.html").module
lines, bars, slots = (getattr(CHARTS, name) for name in ("lines", "bars", "slots"))
SLOT, SLOT_GAP, SLOT_HEIGHT, LEAST_HEIGHT = 4, 1, 40, 1.5
NAMES = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=20)
VALUES = st.lists(st.none() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False),
                  min_size=1, max_size=12)  # fmt: skip
SLOT_VALUES = st.lists(st.none() | st.floats(0, 1e9), min_size=1, max_size=20)
stacked = partial(bars, stacked=True)


def elements(root: ET.Element, tag: str) -> list[ET.Element]:
    return [element for element in root.iter() if element.tag == tag and element.find("title") is not None]


def titles(root: ET.Element) -> list[str | None]:
    return [title.text for title in root.iter("title")]


def texts(root: ET.Element, css_class: str | None = None) -> list[str | None]:
    return [element.text for element in root.iter("text") if element.get("class") == css_class]


@pytest.mark.parametrize("draw", [lines, bars, stacked])
@given(title=NAMES, series=st.dictionaries(NAMES, VALUES, min_size=1, max_size=5))
@example("least", {"value": [5e-324]})
@example("widest", {"value": [1.7e308, -1.7e308]})
def test_chart_is_well_formed_escaped_and_within_its_frame(
    draw: Callable[..., Markup], title: str, series: dict[str, list[float | None]]
) -> None:
    size = min(len(values) for values in series.values())
    labels = [f"<{place}>" for place in range(size)]
    if draw is stacked:  # counts
        series = {name: [value and abs(value) for value in values] for name, values in series.items()}
    root = ET.fromstring(draw(title, labels, {name: values[:size] for name, values in series.items()}))
    assert root.get("role") == "img"
    assert (root.get("aria-label") or "").startswith(f"{title}. ")
    for element in root.iter():
        assert element.tag in ("svg", "g", "path", "rect", "text", "title")
        assert not {"style", "id", "onclick"} & set(element.attrib)
        for name in ("x", "y", "width", "height"):
            assert -0.1 <= float(element.get(name, "0")) <= 480.1, name
    assert len(titles(root)) == sum(value is not None for values in series.values() for value in values[:size])


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([0, 24], ["0", "5", "10", "15", "20", "25"]),
        ([1, 2], ["0", "1", "2"]),
        ([0, 0], ["0", "1"]),
        ([0.04, 0.26], ["0", "0.1", "0.2", "0.3"]),
        ([-0.02, 0.011], ["-0.02", "-0.01", "0", "0.01", "0.02"]),
        ([1_578, None], ["0", "500", "1\u202f000", "1\u202f500", "2\u202f000"]),
        ([-3, -7], ["-8", "-6", "-4", "-2", "0"]),
    ],
)
def test_scale_goes_from_zero_in_round_steps(values: list[float | None], scale: list[str]) -> None:
    root = ET.fromstring(lines("Reads", ["a", "b"], {"Reads": values}))
    assert texts(root, "y") == scale


def test_line_has_a_gap_when_a_value_is_missing() -> None:
    root = ET.fromstring(lines("Reads", list("abcdef"), {"Reads": [1, 2, None, 3, None, 4]}))
    line = next(path for path in root.iter("path") if path.get("class") is None)
    assert re.sub(r"[\d. ]+", "", line.attrib["d"].replace("h0", "h")) == "MhLhMhMh"
    assert titles(root) == ["a: 1", "b: 2", "d: 3", "f: 4"]


def test_bars_are_side_by_side_or_stacked() -> None:
    series = {"now": [1.0, 3.0], "before": [2.0, 1.0]}
    beside = elements(ET.fromstring(bars("Users", ["a", "b"], series, unit="%")), "rect")
    assert [bar.findtext("title") for bar in beside] == ["a: 1 %", "b: 3 %", "a: 2 %", "b: 1 %"]
    heights = [float(bar.attrib["height"]) for bar in beside]
    assert heights == pytest.approx([heights[0], 3 * heights[0], 2 * heights[0], heights[0]], abs=0.2)
    edges = [(float(bar.attrib["x"]), float(bar.attrib["width"])) for bar in beside]
    assert edges[2][0] == pytest.approx(edges[0][0] + edges[0][1], abs=0.11)
    below, _, above, _ = elements(ET.fromstring(stacked("Users", ["a", "b"], series)), "rect")
    assert below.attrib["x"] == above.attrib["x"]
    assert float(above.attrib["y"]) + float(above.attrib["height"]) == pytest.approx(float(below.attrib["y"]), abs=0.11)


def test_labels_are_thinned_and_legend_needs_several_series() -> None:
    labels = [f"{day} Nov" for day in range(1, 31)]
    root = ET.fromstring(bars("Users", labels, {"one": [1] * 30}))
    assert texts(root) == [f"{day} Nov" for day in (1, 6, 11, 16, 21, 26)]
    assert texts(root, "legend") == []
    long = [f"a label of thirty characters {place}" for place in range(6)]
    root = ET.fromstring(bars("Users", long, {"one": [1] * 6, "other": [1] * 6}))
    assert texts(root) == [long[0], long[3]]
    assert texts(root, "legend") == ["one", "other"]


def test_chart_has_an_accessible_name() -> None:
    def name(series: dict[str, list[float | None]], spoken: str | None = None) -> str | None:
        return ET.fromstring(bars("Reads", list("abc"), series, spoken=spoken)).get("aria-label")

    assert name({"Reads": [1, None, 2.5]}) == "Reads. latest 2.5, lowest 1, highest 2.5."
    assert name({"warm": [1, 3, None], "cold": [None] * 3}) == "Reads. warm: no latest value, lowest 1, highest 3."
    assert name({"warm": [None] * 3}) == "Reads. No data yet."
    assert name({"warm": [1, 2, 3]}, spoken="most have 3") == "most have 3"


def small_bars(values: list[float | None], unit: str = "count", title: str = "Requests") -> ET.Element:
    labels = [f"12:{number:02d}" for number in range(len(values))]
    return ET.fromstring(slots(title, labels, values, unit))


def places(values: list[float | None]) -> list[tuple[float, float, float]]:
    found = small_bars(values).iter("rect")
    return [(float(bar.attrib["x"]), float(bar.attrib["y"]), float(bar.attrib["height"])) for bar in found]


@given(values=SLOT_VALUES)
def test_small_bars_are_in_the_slots_of_their_values(values: list[float | None]) -> None:
    found = places(values)
    assert [x / SLOT for x, _, _ in found] == [number for number, value in enumerate(values) if value is not None]
    for _, top, tall in found:
        assert 0 <= top <= SLOT_HEIGHT
        assert LEAST_HEIGHT - 0.05 <= tall <= SLOT_HEIGHT
        assert top + tall == pytest.approx(SLOT_HEIGHT, abs=0.11)


@given(values=st.lists(st.floats(0, 1e9), min_size=2, max_size=20))
def test_small_bars_are_ordered_by_height(values: list[float]) -> None:
    heights = [tall for _, _, tall in places([*values])]
    order = sorted(range(len(values)), key=values.__getitem__)
    assert [heights[number] for number in order] == sorted(heights)
    assert max(heights) == (SLOT_HEIGHT if max(values) > 0 else LEAST_HEIGHT)


def test_zero_differs_from_a_gap() -> None:
    top = SLOT_HEIGHT - LEAST_HEIGHT
    assert places([0.0, None, 0.0]) == [(0, top, LEAST_HEIGHT), (2 * SLOT, top, LEAST_HEIGHT)]


def test_small_bars_have_width_name_and_escaped_text() -> None:
    hostile = "<script>\"'&"
    root = small_bars([1.0, None, 4.0, 2.0, None], "per_s", title=hostile)
    assert root.attrib["viewBox"] == f"0 0 {5 * SLOT - SLOT_GAP} {SLOT_HEIGHT}"
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == f"{hostile}: latest 2 /s, highest 4 /s"
    assert titles(root) == ["12:00: 1 /s", "12:02: 4 /s", "12:03: 2 /s"]
    assert small_bars([None]).attrib["aria-label"] == "Requests: no data yet"
