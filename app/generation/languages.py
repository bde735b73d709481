"""The languages in which the template can word tips.

To add a language, write its `Phrases` and add them to `LANGUAGES`. Each phrase is a whole sentence or adverbial, so the
code needs no rules of grammar. A comment on each field says what its `{}` stands for.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from app.generation.profile_traits import Mood


class Phrases(msgspec.Struct, frozen=True, kw_only=True):
    """The template's phrases in one language. `due` and `was_due` have two `{}`: one for the task, and one for the
    time, which the phrases from `today` to `on_date_of_year` word."""

    quotes: tuple[str, str]
    unnamed: str  # replaces an unreadable title at the beginning of a sentence

    waiting: str  # {}: task
    waiting_important: str  # {}: task
    due: str  # {}: task, time
    was_due: str  # {}: task, time
    important: str  # {}: a `due` or `was_due` sentence

    today: str
    today_at: str  # {}: clock time
    tomorrow: str
    tomorrow_at: str  # {}: clock time
    yesterday: str
    on_weekday: str  # {}: weekday
    on_date: str  # {}: day, month
    on_date_of_year: str  # {}: day, month, year
    weekdays: str  # from Monday on, separated by blanks
    months: str

    encouragement: Mapping[Mood, str]
    good_hour: str  # {}: hour, 1 to 23
    good_midnight: str
    note: str  # {}: quotation, and the full stop after it


ENGLISH = Phrases(
    quotes=("“", "”"),
    unnamed="Your task",
    waiting="{} is waiting for you.",
    waiting_important="{} is one of your important tasks.",
    due="{} is due {}.",
    was_due="{} was due {}.",
    important="Important: {}",
    today="today",
    today_at="today at {}",
    tomorrow="tomorrow",
    tomorrow_at="tomorrow at {}",
    yesterday="yesterday",
    on_weekday="on {}",
    on_date="on {} {}",
    on_date_of_year="on {} {} {}",
    weekdays="Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    months="January February March April May June July August September October November December",
    encouragement={
        "unknown": "Start with one small step: two minutes are enough.",
        "wary": "No pressure: even one small step counts.",
        "finisher": "You usually see things through, so this one is within reach.",
        "mixed": "It will feel good to cross it off your list.",
        "hesitant": "Just start with the smallest part of it.",
    },
    good_hour="Around {}:00 is usually a good time for you.",
    good_midnight="Around midnight is usually a good time for you.",
    note="Your note: {}{}",
)

# Addresses the user informally with `du`.
GERMAN = Phrases(
    quotes=("„", "“"),
    unnamed="Deine Aufgabe",
    waiting="{} wartet auf dich.",
    waiting_important="{} gehört zu deinen wichtigen Aufgaben.",
    due="{} ist {} fällig.",
    was_due="{} war {} fällig.",
    important="Wichtig: {}",
    today="heute",
    today_at="heute um {} Uhr",
    tomorrow="morgen",
    tomorrow_at="morgen um {} Uhr",
    yesterday="gestern",
    on_weekday="am {}",
    on_date="am {}. {}",
    on_date_of_year="am {}. {} {}",
    weekdays="Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag",
    months="Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    encouragement={
        "unknown": "Fang mit einem kleinen Schritt an: Zwei Minuten genügen.",
        "wary": "Ganz ohne Druck: Schon ein kleiner Schritt zählt.",
        "finisher": "Du bringst die Dinge meistens zu Ende, also schaffst du auch das.",
        "mixed": "Es wird guttun, das von deiner Liste zu streichen.",
        "hesitant": "Fang einfach mit dem kleinsten Teil an.",
    },
    good_hour="Gegen {} Uhr passt es dir meistens gut.",
    good_midnight="Gegen Mitternacht passt es dir meistens gut.",
    note="Deine Notiz: {}{}",
)

LANGUAGES = {"en": ENGLISH, "de": GERMAN}
DEFAULT = "en"


def phrases_of(locale: str) -> Phrases:
    """The phrases for the language of a BCP 47 tag, whatever its region; English if the language is not supported."""
    return LANGUAGES.get(locale.partition("-")[0].lower(), LANGUAGES[DEFAULT])
