"""What templates print: times, durations, numbers, and escaped text."""

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
    shown,
    spelled,
)

NOW = 1_777_000_000_000
TEMPLATES = sorted((Path(app.api.pages.__file__).parent / "templates").glob("*.html"))


def test_duration_is_shown_in_its_largest_units() -> None:
    texts: dict[float | None, str] = {
        None: "–",
        0: "0 ms",
        0.25: "0.25 ms",
        999: "999 ms",
        1_000: "1 s",
        1_500: "1.5 s",
        59_999: "59 s",
        60_000: "1 min",
        125_000: "2 min 5 s",
        3_599_999: "59 min",
        7_500_000: "2 h 5 min",
        86_400_000 * 45: "45 d",
    }
    assert {ms: duration(ms) for ms in texts} == texts


@pytest.mark.parametrize(
    ("when", "said"),
    [(NOW, "just now"), (NOW - 125_000, "2 min 5 s ago"), (NOW + 7_200_000, "in 2 h"), (NOW - 999, "just now")],
)
def test_moment_is_relative_with_the_exact_time_as_title(when: int, said: str) -> None:
    element = ET.fromstring(moment(when, NOW))
    assert element.text == said
    assert element.get("title") == exact(when)
    assert (element.get("datetime") or "").endswith("Z")
    assert moment(None, NOW) == "–"


def test_moment_is_the_same_when_it_is_text() -> None:
    assert moment("2026-04-25T06:30:00.250Z", NOW) == moment(1_777_098_600_250, NOW)


def test_number_has_three_significant_digits() -> None:
    texts = {None: "–", 0.0: "0", 1_234_567: "1\u202f234\u202f567", 1234.5: "1\u202f234", 0.1234: "0.123", 12.0: "12"}
    assert {value: number(value) for value in texts} == texts
    assert (number(0.00001234), number(3, "ms")) == ("0.000012", "3 ms")
    assert [number(value) for value in (1e-8, -3e-7, -0.0, -0.00001234)] == ["0", "0", "0", "-0.000012"]


@pytest.mark.parametrize("value", [10**400, -(10**400), 2**63, 0])
def test_number_is_exact_when_it_is_an_integer(value: int) -> None:
    assert number(value).replace("\u202f", "") == str(value)


def test_percentage_is_0_or_100_only_when_the_share_is() -> None:
    texts = {0: "0", 1: "100", 0.5: "50", 0.99999: "> 99.9", 0.00001: "< 0.1", 0.123: "12.3"}
    assert {share: percent(share) for share in texts} == {share: f"{text}\u202f%" for share, text in texts.items()}
    assert percent(None) == "–"


@pytest.mark.parametrize(
    ("sentence", "text"),
    [
        ("Over 1,234,567 decisions 5% of 12.3%", "Over 1 234 567 decisions 5 % of 12.3 %"),
        ("100.0% and 50.05%", "100 % and 50.05 %"),
        ("1, 2,5, 1,0000 and % stay; so does -0.02", "1, 2,5, 1,0000 and % stay; so does -0.02"),
    ],
)
def test_sentence_has_its_numbers_formatted(sentence: str, text: str) -> None:
    assert spelled(sentence) == text


def test_fixed_number_has_no_negative_zero() -> None:
    assert (fixed(0.12345, 4), fixed(-0.00001, 4)) == ("0.1235", "0.0000")
    assert (fixed(0.1, 4, sign=True), fixed(-0.00001, 4, sign=True)) == ("+0.1000", "+0.0000")


@given(st.text())
def test_pretty_never_fails(payload: str) -> None:
    assert isinstance(pretty(payload), str)
    assert isinstance(pretty("[" * 100_000), str)
    assert pretty('{"a":"\\ud83d"}') == '{"a":"\\ud83d"}'  # half a character could not be sent


@given(st.recursive(st.text() | st.characters(categories=["Cs"]) | st.floats() | st.none(), st.lists))
def test_pretty_can_be_encoded(content: object) -> None:
    assert pretty(json.dumps(content)).encode()


def test_value_is_rounded_and_escaped() -> None:
    values = (None, "<b>", 0.25, 3, 1234.2, 12345.6)
    assert [shown(value) for value in values] == ["null", "&lt;b&gt;", "0.25", "3", "1\u202f234", "12\u202f346"]


def test_unknown_name_is_an_error_and_text_is_escaped() -> None:
    made = environment()
    with pytest.raises(UndefinedError):
        made.from_string("{{ unknown }}").render()
    assert made.from_string("{{ text }}").render(text="<b>'\"&") == "&lt;b&gt;&#39;&#34;&amp;"


@pytest.mark.slow
def test_template_has_no_unsafe_or_inline_code() -> None:
    made = environment()
    for path in TEMPLATES:
        text = path.read_text()
        made.get_template(path.name)  # compiles
        unsafe = r"\|\s*safe\b|autoescape|<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+="
        assert not re.search(unsafe, text), path.name
        assert not re.search(r"(?:src|href)=\"(?:https?:)?//", text), path.name
        posts = re.findall(r"<form\b[^>]*method=\"post\".*?</form>", text, re.DOTALL)
        assert all("csrf" in form for form in posts), path.name


def test_figure_is_shown_in_its_unit() -> None:
    for value, unit, text in (
        (None, "share", "–"),
        (0.9995, "share", "> 99.9\u202f%"),
        (0.25, "ms", "0.25 ms"),
        (1_500.0, "ms", "1.5 s"),
        (0.0, "s", "0 ms"),
        (61.0, "s", "1 min 1 s"),
        (97.13, "per_s", "97.1 /s"),
        (12_345, "count", "12\u202f345"),
        (0, "count", "0"),
    ):
        assert measured(value, unit) == text
