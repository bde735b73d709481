"""The template: its sentences, and a valid text for every request."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings

from app.generation.languages import LANGUAGES, phrases_of
from app.generation.template import template_tip
from app.generation.text_rules import has_link, text_problem
from app.generation.tip_request import Mood, TipRequest, Traits
from tests.support.tip_requests import FINISHER, NOW, REQUESTS, tip_request, with_first_variant

BERLIN = timezone(timedelta(hours=1))
HERE = NOW.astimezone(BERLIN)  # Wednesday, 25 November 2026, 10:30


def at(hour: int, minute: int = 0, **apart: float) -> datetime:
    """A time in Berlin, so far from today."""
    return HERE.replace(hour=hour, minute=minute) + timedelta(**apart)


GOOD = [
    (tip_request(), "“Renew the passport” is waiting for you. Start with one small step: two minutes are enough."),
    (
        tip_request(traits=FINISHER, notes="- Photos first. The office opens at 8.\nBring 60 €"),
        "“Renew the passport” is waiting for you. You usually see things through, so this one is within reach. "
        "Around 9:00 is usually a good time for you. Your note: “Photos first”.",
    ),
    (
        tip_request("Call Anna!", due_at=at(17), priority=5, traits=FINISHER),
        "Important: “Call Anna!” is due today at 17:00. You usually see things through, so this one is within reach.",
    ),
    (
        tip_request(
            "Call Anna", due_at=at(9), traits=Traits(dismisses="often", reads="briefly", hour=7), notes="By phone"
        ),
        "“Call Anna” was due today at 9:00. No pressure: even one small step counts.",
    ),
    (
        tip_request("Read “Dune”", due_at=at(8, 5, days=1), traits=Traits(completes="sometimes", hour=20)),
        "“Read 'Dune'” is due tomorrow at 8:05. It will feel good to cross it off your list.",
    ),
    (
        tip_request("Tax", priority=3, traits=Traits(completes="seldom"), notes="Really?"),
        "“Tax” is one of your important tasks. Just start with the smallest part of it. Your note: “Really?”",
    ),
    (
        tip_request("Tax", due_at=at(12, days=3), traits=Traits(hour=0), locale="en-GB"),
        "“Tax” is due on Saturday at 12:00. Start with one small step: two minutes are enough. "
        "Around midnight is usually a good time for you.",
    ),
    (
        tip_request("Steuer", traits=Traits(hour=0), locale="de"),
        "„Steuer“ wartet auf dich. Fang mit einem kleinen Schritt an: Zwei Minuten genügen. "
        "Gegen Mitternacht passt es dir meistens gut.",
    ),
    (tip_request("... -"), "Your task is waiting for you. Start with one small step: two minutes are enough."),
    (tip_request("✅"), "“✅” is waiting for you. Start with one small step: two minutes are enough."),
    (
        tip_request("Steuer", due_at=at(17), priority=5, traits=FINISHER, locale="de-AT"),
        "Wichtig: „Steuer“ ist heute um 17:00 Uhr fällig. Du bringst die Dinge meistens zu Ende, also schaffst du "
        "auch das.",
    ),
    (
        tip_request("Pass", traits=FINISHER, notes="Erst die Fotos. Ab 8 Uhr offen.", locale="DE"),
        "„Pass“ wartet auf dich. Du bringst die Dinge meistens zu Ende, also schaffst du auch das. "
        "Gegen 9 Uhr passt es dir meistens gut. Deine Notiz: „Erst die Fotos“.",
    ),
    (
        tip_request("\u202e\x00", priority=4, locale="de"),
        "Deine Aufgabe gehört zu deinen wichtigen Aufgaben. Fang mit einem kleinen Schritt an: Zwei Minuten genügen.",
    ),
]


@pytest.mark.parametrize(("asked", "text"), GOOD, ids=range(len(GOOD)))
def test_tip_fits_task_and_traits(asked: TipRequest, text: str) -> None:
    assert with_first_variant(template_tip(asked), asked.traits.mood, asked.locale) == text


@pytest.mark.parametrize("locale", ["en", "de"])
@pytest.mark.parametrize("mood", get_args(Mood))
def test_encouragement_differs_between_days_and_tasks(locale: str, mood: Mood) -> None:
    traits = {
        "unknown": Traits(), "wary": Traits(dismisses="often"), "finisher": Traits(completes="usually"),
        "mixed": Traits(completes="sometimes"), "hesitant": Traits(completes="seldom"),
    }[mood]  # fmt: skip
    variants = phrases_of(locale).encouragement[mood]
    assert len(set(variants)) == len(variants) >= 6

    def chosen(title: str, days: int) -> str:
        request = tip_request(title, traits=traits, locale=locale)
        said = template_tip(msgspec.structs.replace(request, now=NOW + timedelta(days=days)))
        assert said == template_tip(msgspec.structs.replace(request, now=NOW + timedelta(days=days, minutes=5)))
        (found,) = [variant for variant in variants if variant in said]
        return found

    assert {chosen("Tax", days) for days in range(60)} == set(variants)
    assert {chosen(f"Tax {number}", 0) for number in range(60)} == set(variants)


@pytest.mark.parametrize(
    ("due_at", "american"),
    [
        (at(17), "is due today at 5:00 PM."),
        (at(0, 1, days=1), "is due tomorrow at 12:01 AM."),
        (at(12, days=2), "is due on Friday at 12:00 PM."),
        (at(9, days=9), "is due on December 4 at 9:00 AM."),
        (at(0, days=60), "is due on January 24, 2027."),
    ],
)
def test_dates_and_times_are_american_in_the_united_states(due_at: datetime, american: str) -> None:
    said = template_tip(tip_request("T", due_at=due_at, locale="en-US", traits=FINISHER))
    assert said.startswith(f"“T” {american} ")
    assert ("Around 9 AM is usually" in said) == (due_at > at(23, 59, days=1))


@pytest.mark.parametrize(
    ("due_at", "english", "german"),
    [
        (at(0), "is due today.", "ist heute fällig."),
        (at(10, 29), "was due today at 10:29.", "war heute um 10:29 Uhr fällig."),
        (at(10, 30), "is due today at 10:30.", "ist heute um 10:30 Uhr fällig."),
        (at(0, days=1), "is due tomorrow.", "ist morgen fällig."),
        (at(0, 1, days=1), "is due tomorrow at 0:01.", "ist morgen um 0:01 Uhr fällig."),
        (at(23, days=-1), "was due yesterday.", "war gestern fällig."),
        (at(0, days=-1), "was due yesterday.", "war gestern fällig."),
        (at(23, days=6), "is due on Tuesday at 23:00.", "ist am Dienstag um 23:00 Uhr fällig."),
        (at(0, days=6), "is due on Tuesday.", "ist am Dienstag fällig."),
        (at(0, days=7), "is due on 2 December.", "ist am 2. Dezember fällig."),
        (at(9, days=-2), "was due on 23 November.", "war am 23. November fällig."),
        (at(9, days=60), "is due on 24 January 2027 at 9:00.", "ist am 24. Januar 2027 um 9:00 Uhr fällig."),
        (datetime(1, 1, 1, tzinfo=BERLIN), "was due on 1 January 1.", "war am 1. Januar 1 fällig."),
        (
            datetime(9999, 12, 31, 23, tzinfo=BERLIN),
            "is due on 31 December 9999 at 23:00.",
            "ist am 31. Dezember 9999 um 23:00 Uhr fällig.",
        ),
    ],
)
def test_due_date_is_named_by_its_distance(due_at: datetime, english: str, german: str) -> None:
    assert template_tip(tip_request("T", due_at=due_at)).startswith(f"“T” {english} ")
    assert template_tip(tip_request("T", due_at=due_at, locale="de")).startswith(f"„T“ {german} ")


def test_day_is_local_to_the_offset_of_the_due_date() -> None:
    late = datetime(2026, 11, 25, 23, 30, tzinfo=timezone(timedelta(hours=-8)))  # 26 November in Berlin
    assert "is due today at 23:30" in template_tip(tip_request(due_at=late))
    assert "is due tomorrow at 8:30" in template_tip(tip_request(due_at=late.astimezone(BERLIN)))
    # In this zone it is 22:30 on 24 November.
    yesterday_here = datetime(2026, 11, 24, 23, 30, tzinfo=timezone(timedelta(hours=-11)))
    assert "is due today at 23:30" in template_tip(tip_request(due_at=yesterday_here))


def test_long_title_is_cut_between_words() -> None:
    assert template_tip(tip_request("word " * 60)).startswith("“" + "word " * 18 + "word…” is waiting")


@pytest.mark.parametrize("days", [-1, 0, 1])
def test_good_hour_is_left_out_when_the_task_does_not_wait_for_it(days: int) -> None:
    assert "9:00 is usually" not in template_tip(tip_request(due_at=at(23, days=days), traits=FINISHER))
    assert "9:00 is usually" in template_tip(tip_request(due_at=at(23, days=2), traits=FINISHER))


def test_text_is_short_when_its_reader_reads_briefly() -> None:
    hasty = FINISHER._replace(reads="briefly")
    assert template_tip(tip_request(notes="A note", traits=hasty)).count(".") == 2


@pytest.mark.parametrize(
    ("locale", "language"),
    [
        ("en", "en"),
        ("en-GB", "en"),
        ("EN-us", "en-us"),
        ("en-Latn-US", "en-us"),
        ("de", "de"),
        ("de-Latn-AT", "de"),
        ("fr", "en"),
        ("dev", "en"),
    ],
)
def test_language_is_that_of_the_tag_or_english(locale: str, language: str) -> None:
    assert phrases_of(locale) is LANGUAGES[language]


@given(REQUESTS)
@settings(max_examples=2 * settings().max_examples)
def test_every_request_gets_a_valid_text(asked: TipRequest) -> None:
    text = template_tip(asked)
    assert text_problem(text, may_link=has_link(asked.title + (asked.notes or ""))) is None
    assert template_tip(asked) == text
    opening, closing = phrases_of(asked.locale).quotes
    assert text.count(opening) == text.count(closing) <= 2  # quoted text cannot end its quotation
    assert text[-1] in ".?!…" + closing


@pytest.mark.parametrize("language", LANGUAGES)
def test_phrases_have_their_places_and_no_more(language: str) -> None:
    phrases = LANGUAGES[language]
    places = {
        "waiting": 1, "waiting_important": 1, "due": 2, "was_due": 2, "important": 1, "today": 0, "tomorrow": 0,
        "yesterday": 0, "on_weekday": 1, "at": 2, "good_hour": 1, "hour": 1, "good_midnight": 0, "note": 2,
        "unnamed": 0,
    }  # fmt: skip
    assert {name: getattr(phrases, name).count("{}") for name in places} == places
    for name, fields in (("on_date", ["day", "month"]), ("on_date_of_year", ["day", "month", "year"])):
        assert sorted(re.findall(r"{(\w+)}", getattr(phrases, name))) == fields
    weekdays, months = phrases.weekdays.split(), phrases.months.split()
    assert len(weekdays) == len(set(weekdays)) == 7
    assert len(months) == len(set(months)) == 12
    assert set(phrases.encouragement) == {"unknown", "wary", "finisher", "mixed", "hesitant"}
    assert phrases.quotes[0] != phrases.quotes[1]
