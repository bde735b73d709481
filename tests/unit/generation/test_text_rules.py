"""What may stand in a tip, and what is taken out of a task."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.generation.text_rules import MAX_TEXT, cleaned, gist, problem_of, shortened, tidied
from tests.support.tip_orders import TEXTS


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Call Anna.", None),
        ("Ruf Anna an – jetzt!", None),
        ("להתקשר \u200fלאנה", None),
        ("家族 👩\u200d👧 に電話", None),
        ("a" * MAX_TEXT, None),
        ("a" * (MAX_TEXT + 1), "it has more than 500 characters"),
        ("", "it says nothing"),
        (" \n", "it says nothing"),
        ("…!", "it says nothing"),
        ("Two\nparagraphs", "it is not one paragraph"),
        ("Two\u2029paragraphs", "it is not one paragraph"),
        ("Two  spaces", "it is not one paragraph"),
        ("A \x1b[31mred\x07 tip", "it has a character that is not to be seen"),
        ("A \u202egninrut tip", "it has a character that is not to be seen"),
        ("Hidden \U000e0041\U000e0042", "it has a character that is not to be seen"),
        ("\u3164\u3164", "it has a character that is not to be seen"),
        ("Hidden\U000e0163\U000e0153", "it has a character that is not to be seen"),
        ("Hidden\ufe01\ufe02", "it has a character that is not to be seen"),
        ("A heart \u2764\ufe0f", None),
        ("half \ud83d", "it has a character that is not to be seen"),
        ("See https://evil.example", "it has a link"),
        ("See WWW.evil.example", "it has a link"),
        ("See [this](evil)", "it has a link"),
    ],
)
def test_text_is_judged(text: str, problem: str | None) -> None:
    assert problem_of(text) == problem


def test_link_is_let_through_when_the_task_has_one() -> None:
    assert problem_of("Read https://example.org", may_link=True) is None


@given(TEXTS)
def test_cleaned_text_is_one_line_in_which_all_is_seen(text: str) -> None:
    line = cleaned(text)
    assert line == tidied(line) == cleaned(line)
    assert problem_of(line or "x", may_link=True) in (
        None,
        "it says nothing",
        f"it has more than {MAX_TEXT} characters",
    )


@pytest.mark.parametrize(
    ("notes", "found"),
    [
        ("", ""),
        (" \n---\n***", ""),
        ("- [ ] Photos first. The office opens at 8.", "Photos first"),
        ("[x] Photos first", "Photos first"),
        ("**Photos** first", "Photos first"),
        ("Pick ** or [x] there", "Pick ** or [x] there"),
        ("1. Photos first. Then the form.", "1. Photos first"),
        ("Dr. Meyer anrufen. Sie ist ab 8 Uhr da.", "Dr. Meyer anrufen"),
        ("Am 3. Mai um 9 Uhr", "Am 3. Mai um 9 Uhr"),
        ("Alles mitbringen, z. B. die Fotos. Danke!", "Alles mitbringen, z. B. die Fotos"),
        ("Porto inkl. Umschlag, Prof. Kim, approx. 5 €", "Porto inkl. Umschlag, Prof. Kim, approx. 5 €"),
        ("Be there at 9 a.m. sharp, ask for Mr. Smith", "Be there at 9 a.m. sharp, ask for Mr. Smith"),
        ("ask the dentist. or the nurse", "ask the dentist. or the nurse"),
        ("!!! Urgent", "Urgent"),
        ("… and the form! Today.", "and the form!"),
        ("\n\n# Heading\ntext", "Heading"),
        ("Is it open? Ask.", "Is it open?"),
        ("Version 2.0 of it; then more", "Version 2.0 of it; then more"),
        ("soft\u00adhyphen\u200b and \u202eturned", "softhyphen and turned"),
    ],
)
def test_gist_is_the_first_sentence_that_says_something(notes: str, found: str) -> None:
    assert gist(notes, 80) == found


@given(TEXTS, st.integers(2, 120))
def test_text_is_never_longer_than_asked_for(text: str, most: int) -> None:
    short = shortened(text, most)
    assert len(short) <= most
    assert short == text if len(text) <= most else short.endswith("…")


def test_text_is_cut_between_words_when_it_is_too_long() -> None:
    assert shortened("one two three four", 12) == "one two…"
    assert shortened("one, two three", 9) == "one, two…"
    assert shortened("one two, three four", 10) == "one two…"
    assert shortened("👩\u200d👧👩\u200d👧", 3) == "👩…"
    assert shortened("incomprehensibility", 8) == "incompr…"
