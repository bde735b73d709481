"""The bars of the overview's tiles: one for each value, none for a gap, and nothing said becomes markup."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.pages.sparks import GAP, HEIGHT, LEAST, STEP, slots

VALUES = st.lists(st.none() | st.floats(0, 1e9), min_size=1, max_size=20)


def drawn(values: list[float | None], said: list[str] | None = None, title: str = "Requests") -> ET.Element:
    """The drawing, parsed: it is well-formed XML."""
    labels = [f"12:{number:02d}" for number in range(len(values))]
    return ET.fromstring(str(slots(title, labels, values, said or [str(value) for value in values])))


def bars(values: list[float | None]) -> list[tuple[float, float, float]]:
    """Of each bar: left edge, top, height."""
    return [
        (float(bar.attrib["x"]), float(bar.attrib["y"]), float(bar.attrib["height"]))
        for bar in drawn(values)
        if bar.tag.endswith("rect")
    ]


@given(values=VALUES)
def test_every_value_has_a_bar_in_its_place_and_a_gap_has_none(values: list[float | None]) -> None:
    found = bars(values)
    assert [x / STEP for x, _, _ in found] == [number for number, value in enumerate(values) if value is not None]
    for _, top, tall in found:
        assert 0 <= top <= HEIGHT
        assert LEAST - 0.05 <= tall <= HEIGHT
        assert top + tall == pytest.approx(HEIGHT, abs=0.11)


@given(values=st.lists(st.floats(0, 1e9), min_size=2, max_size=20))
def test_greater_values_have_taller_bars_and_the_greatest_fills_the_height(values: list[float]) -> None:
    heights = [tall for _, _, tall in bars([*values])]
    order = sorted(range(len(values)), key=values.__getitem__)
    assert [heights[number] for number in order] == sorted(heights)
    assert max(heights) == (HEIGHT if max(values) > 0 else LEAST)


def test_zero_can_be_told_from_a_gap() -> None:
    assert bars([0.0, None, 0.0]) == [(0, HEIGHT - LEAST, LEAST), (2 * STEP, HEIGHT - LEAST, LEAST)]


def test_drawing_is_as_wide_as_its_slots_and_names_itself() -> None:
    root = drawn([1.0, None, 4.0, None], ["1 /s", "–", "4 /s", "–"])
    assert root.attrib["viewBox"] == f"0 0 {4 * STEP - GAP} {HEIGHT}"
    assert (root.attrib["role"], root.attrib["aria-label"]) == ("img", "Requests: latest 4 /s, highest 4 /s")
    assert [title.text for title in root.iter("title")] == ["12:00: 1 /s", "12:02: 4 /s"]
    assert drawn([None]).attrib["aria-label"] == "Requests: nothing to show yet"


def test_what_is_said_is_escaped() -> None:
    hostile = "<script>\"'&"
    root = drawn([1.0], [hostile], title=hostile)
    assert [child.tag for child in root] == ["rect"]
    assert hostile in root.attrib["aria-label"]
    assert [title.text for title in root.iter("title")] == [f"12:00: {hostile}"]
