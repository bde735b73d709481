"""The rules for the text of a tip, and the cleaning of a task's text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.generation.text_rules import MAX_TEXT, cleaned, first_sentence, shortened, single_spaced, text_problem
from tests.support.tip_requests import TEXTS

CHECKED: list[tuple[str, str | None]] = [
    ("Call Anna.", None),
    ("Ruf Anna an – jetzt!", None),
    ("להתקשר \u200fלאנה", None),
    ("家族 👩\u200d👧 に電話", None),
    ("a" * MAX_TEXT, None),
    ("a" * (MAX_TEXT + 1), "it has more than 500 characters"),
    ("", "it contains no word"),
    (" \n", "it contains no word"),
    ("…!", "it contains no word"),
    ("Two\nparagraphs", "it is not one paragraph"),
    ("Two\u2029paragraphs", "it is not one paragraph"),
    ("Two  spaces", "it is not one paragraph"),
    ("A \x1b[31mred\x07 tip", "it has a hidden character"),
    ("A \u202egninrut tip", "it has a hidden character"),
    ("Hidden \U000e0041\U000e0042", "it has a hidden character"),
    ("\u3164\u3164", "it has a hidden character"),
    ("Hidden\U000e0163\U000e0153", "it has a hidden character"),
    ("Hidden\ufe01\ufe02", "it has a hidden character"),
    ("A heart \u2764\ufe0f", None),
    ("half \ud83d", "it has a hidden character"),
    ("See https://evil.example", "it has a link"),
    ("See WWW.evil.example", "it has a link"),
    ("See [this](evil)", "it has a link"),
]


def test_text_is_checked() -> None:
    for text, problem in CHECKED:
        assert text_problem(text) == problem, text
        assert text_problem(text, may_link=True) == (None if problem == "it has a link" else problem)


@given(TEXTS)
def test_cleaned_text_is_one_line_without_hidden_characters(text: str) -> None:
    line = cleaned(text)
    assert line == single_spaced(line) == cleaned(line)
    assert text_problem(line or "x", may_link=True) in (
        None,
        "it contains no word",
        f"it has more than {MAX_TEXT} characters",
    )


FIRST_SENTENCES: list[tuple[str, str]] = [
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
]


def test_first_sentence_is_the_first_one_with_a_word() -> None:
    for notes, found in FIRST_SENTENCES:
        assert first_sentence(notes, 80) == found, notes


@given(TEXTS, st.integers(2, 120))
def test_shortened_text_is_never_too_long(text: str, most: int) -> None:
    short = shortened(text, most)
    assert len(short) <= most
    assert short == text if len(text) <= most else short.endswith("…")


@pytest.mark.parametrize(
    ("text", "most", "short"),
    [
        ("one two three four", 12, "one two…"),
        ("one, two three", 9, "one, two…"),
        ("one two, three four", 10, "one two…"),
        ("👩\u200d👧👩\u200d👧", 3, "👩…"),
        ("incomprehensibility", 8, "incompr…"),
    ],
)
def test_text_is_cut_between_words_if_possible(text: str, most: int, short: str) -> None:
    assert shortened(text, most) == short
