"""What templates print: times, lengths of time, numbers; and that nothing they print is markup of somebody else's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError

import app.api.pages
from app.api.pages.templating import (
    duration,
    environment,
    exact,
    fixed,
    measured,
    moment,
    number,
    percent,
    pretty,
    segment,
    shown,
    spelled,
)

NOW = 1_777_000_000_000
TEMPLATES = sorted((Path(app.api.pages.__file__).parent / "templates").glob("*.html"))


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (None, "–"),
        (0, "0 ms"),
        (0.25, "0.25 ms"),
        (999, "999 ms"),
        (1_000, "1 s"),
        (1_500, "1.5 s"),
        (59_999, "59 s"),
        (60_000, "1 min"),
        (125_000, "2 min 5 s"),
        (3_599_999, "59 min"),
        (7_500_000, "2 h 5 min"),
        (86_400_000 * 45, "45 d"),
    ],
)
def test_duration_is_told_in_its_largest_units(ms: float | None, text: str) -> None:
    assert duration(ms) == text


@pytest.mark.parametrize(
    ("when", "said"),
    [(NOW, "just now"), (NOW - 125_000, "2 min 5 s ago"), (NOW + 7_200_000, "in 2 h"), (NOW - 999, "just now")],
)
def test_moment_is_told_as_people_do_with_the_exact_time_beside_it(when: int, said: str) -> None:
    element = ET.fromstring(moment(when, NOW))
    assert element.text == said
    assert element.get("title") == exact(when)
    assert (element.get("datetime") or "").endswith("Z")
    assert moment(None, NOW) == "–"


def test_moment_is_the_same_when_it_comes_as_text() -> None:
    assert moment("2026-04-25T06:30:00.250Z", NOW) == moment(1_777_098_600_250, NOW)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (1_234_567, "1\u202f234\u202f567"),
        (1234.5, "1\u202f234"),
        (0.1234, "0.123"),
        (0.00001234, "0.000012"),
        (12.0, "12"),
    ],
)
def test_number_shows_what_matters(value: float | None, text: str) -> None:
    assert number(value) == text
    assert number(3, "ms") == "3 ms"


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, "–"), (0, "0"), (1, "100"), (0.5, "50"), (0.99999, "> 99.9"), (0.00001, "< 0.1"), (0.123, "12.3")],
)
def test_percentage_is_never_all_or_nothing_when_the_share_is_not(share: float | None, text: str) -> None:
    assert percent(share) == (text if share is None else f"{text}\u202f%")


@pytest.mark.parametrize(
    ("sentence", "text"),
    [
        ("Over 1,234,567 decisions 5% of 12.3%", "Over 1 234 567 decisions 5 % of 12.3 %"),
        ("100.0% and 50.05%", "100 % and 50.05 %"),
        ("1, 2,5, 1,0000 and % stay; so does -0.02", "1, 2,5, 1,0000 and % stay; so does -0.02"),
    ],
)
def test_sentence_has_its_numbers_as_pages_write_them(sentence: str, text: str) -> None:
    assert spelled(sentence) == text


@pytest.mark.parametrize(
    ("value", "sign", "text"),
    [(0.12345, False, "0.1235"), (0.1, True, "+0.1000"), (-0.00001, True, "+0.0000"), (-0.00001, False, "0.0000")],
)
def test_nothing_is_less_than_nothing(value: float, sign: bool, text: str) -> None:
    assert fixed(value, 4, sign=sign) == text


@given(st.text(min_size=1))
def test_segment_holds_no_character_that_means_something_in_an_address(text: str) -> None:
    try:
        quoted = segment(text)
    except UnicodeEncodeError:
        return  # a lone surrogate, which is in no id
    assert re.fullmatch(r"[A-Za-z0-9_.\-~%]+", quoted)


@given(st.text())
def test_pretty_never_fails(payload: str) -> None:
    assert isinstance(pretty(payload), str)
    assert isinstance(pretty("[" * 100_000), str)
    assert pretty('{"a":"\\ud83d"}') == '{"a":"\\ud83d"}'  # half a character could not be sent


@given(st.recursive(st.text() | st.characters(categories=["Cs"]) | st.floats() | st.none(), st.lists))
def test_pretty_can_be_sent(content: object) -> None:
    assert pretty(json.dumps(content)).encode()


def test_value_is_shown_for_people() -> None:
    values = (None, "<b>", 0.25, 3, 1234.2, 12345.6)
    assert [shown(value) for value in values] == ["null", "&lt;b&gt;", "0.25", "3", "1\u202f234", "12\u202f346"]


def test_name_that_nobody_gave_is_an_error_and_text_is_escaped() -> None:
    made = environment()
    with pytest.raises(UndefinedError):
        made.from_string("{{ nobody }}").render()
    assert made.from_string("{{ text }}").render(text="<b>'\"&") == "&lt;b&gt;&#39;&#34;&amp;"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_template_marks_nothing_as_safe_and_has_no_inline_script_or_style(path: Path) -> None:
    text = path.read_text()
    environment().get_template(path.name)  # compiles
    assert not re.search(r"\|\s*safe\b|autoescape|<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", text)
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", text)
    posts = re.findall(r"<form\b[^>]*method=\"post\".*?</form>", text, re.DOTALL)
    assert all("csrf" in form for form in posts)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "share", "–"),
        (0.9995, "share", "> 99.9\u202f%"),
        (0.25, "ms", "0.25 ms"),
        (1_500.0, "ms", "1.5 s"),
        (0.0, "s", "0 ms"),
        (61.0, "s", "1 min 1 s"),
        (97.13, "per_s", "97.1 /s"),
        (12_345, "count", "12\u202f345"),
        (0, "count", "0"),
    ],
)
def test_figure_is_shown_in_its_unit(value: float | None, unit: str, text: str) -> None:
    assert measured(value, unit) == text
