"""Which ids are allowed, and how a moment is written."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.features.clock import rfc3339, to_ms
from app.features.ids import id_problem


@pytest.mark.parametrize(
    "value", ["a", "x" * 128, "…", "a b", "%2F", "{u}", "😀" * 128, "...", "a.", "user@example.org"]
)
def test_id_is_allowed_when_it_keeps_the_rules(value: str) -> None:
    assert id_problem(value) is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "empty"),
        ("x" * 129, "at most 128 characters, has 129"),
        (".", "must not be . or .."),
        ("..", "must not be . or .."),
        ("a/b", "must not contain /"),
        ("a\x00b", "U+0000"),
        ("a\nb", "U+000A"),
        ("\x7f", "U+007F"),
        ("\x9f", "U+009F"),
        ("a\ud800", "U+D800"),
        ("\udfff", "U+DFFF"),
    ],
)
def test_id_is_refused_with_the_reason_when_it_breaks_a_rule(value: str, reason: str) -> None:
    assert reason in (id_problem(value) or "")


@given(st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(2200, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001  # Hypothesis wants naive bounds
def test_moment_survives_its_text_form_when_cut_to_milliseconds(moment: datetime) -> None:
    moment_ms = to_ms(moment)
    read = datetime.fromisoformat(rfc3339(moment_ms))
    assert to_ms(read) == moment_ms
    assert 0 <= (moment - read).total_seconds() < 0.001
