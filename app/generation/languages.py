"""The languages in which the template can word tips.

To add a language, write its `Phrases` and add them to `LANGUAGES`. Each phrase is a whole sentence or adverbial, so the
code needs no rules of grammar. A comment on each field says what its `{}` stands for.
"""

from collections.abc import Mapping, Sequence

import msgspec

from app.generation.tip_request import Mood


class Phrases(msgspec.Struct, frozen=True, kw_only=True):
    """The template's phrases in one language. In `due` and `was_due`, the first `{}` is the task and the second the
    time, such as `tomorrow at 17:30`. `encouragement` has variants for each mood."""

    quotes: tuple[str, str]
    unnamed: str  # replaces an unreadable title at the beginning of a sentence

    waiting: str  # {}: task
    waiting_important: str  # {}: task
    due: str  # {}: task, time
    was_due: str  # {}: task, time
    important: str  # {}: a `due` or `was_due` sentence

    today: str
    tomorrow: str
    yesterday: str
    on_weekday: str  # {}: weekday
    on_date: str  # {day}, {month}
    on_date_of_year: str  # {day}, {month}, {year}
    at: str  # {}: one of the phrases from `today` on, clock time
    twelve_hours: bool = False  # clock times such as 5:30 PM, in place of 17:30
    weekdays: str  # from Monday on, separated by blanks
    months: str

    encouragement: Mapping[Mood, Sequence[str]]
    good_hour: str  # {}: hour
    hour: str  # {}: 1 to 23; unless `twelve_hours`
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
    tomorrow="tomorrow",
    yesterday="yesterday",
    on_weekday="on {}",
    on_date="on {day} {month}",
    on_date_of_year="on {day} {month} {year}",
    at="{} at {}",
    weekdays="Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    months="January February March April May June July August September October November December",
    encouragement={
        "unknown": (
            "Start with one small step: two minutes are enough.",
            "Two quiet minutes are enough to begin.",
            "Pick the easiest part and begin there.",
            "A first step now makes the rest easier.",
            "Decide on the first step and take it.",
            "Begin with whatever takes the least effort.",
        ),
        "wary": (
            "No pressure: even one small step counts.",
            "Only if it suits you now.",
            "It can stay small: one step is progress.",
            "Do as little of it as you like; it all counts.",
            "A minute of it is better than none.",
            "Whenever you are ready, the first step can be tiny.",
        ),
        "finisher": (
            "You usually see things through, so this one is within reach.",
            "You have finished many like it.",
            "One more for your list of finished tasks.",
            "Finishing is what you do, so go ahead.",
            "At your pace it will be done soon.",
            "You know how good it feels to finish.",
        ),
        "mixed": (
            "It will feel good to cross it off your list.",
            "Once it is done, your list is shorter.",
            "Do it now, and it is off your mind.",
            "Give it a few minutes and see how far you get.",
            "Part of it today makes tomorrow lighter.",
            "It may take less time than you expect.",
        ),
        "hesitant": (
            "Just start with the smallest part of it.",
            "It need not be perfect; a beginning is enough.",
            "Set a timer for five minutes and stop when it rings.",
            "Look at it, and do one thing.",
            "Ask yourself what the first two minutes look like.",
            "Write down the first step, and do only that.",
        ),
    },
    good_hour="Around {} is usually a good time for you.",
    hour="{}:00",
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
    tomorrow="morgen",
    yesterday="gestern",
    on_weekday="am {}",
    on_date="am {day}. {month}",
    on_date_of_year="am {day}. {month} {year}",
    at="{} um {} Uhr",
    weekdays="Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag",
    months="Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    encouragement={
        "unknown": (
            "Fang mit einem kleinen Schritt an: Zwei Minuten genügen.",
            "Zwei ruhige Minuten reichen für den Anfang.",
            "Such dir den leichtesten Teil aus und fang damit an.",
            "Ein erster Schritt macht den Rest leichter.",
            "Überleg dir den ersten Schritt und mach ihn gleich.",
            "Beginn mit dem, was am wenigsten Mühe macht.",
        ),
        "wary": (
            "Ganz ohne Druck: Schon ein kleiner Schritt zählt.",
            "Nur wenn es dir gerade passt.",
            "Es darf klein bleiben: Ein Schritt ist schon etwas.",
            "Mach so wenig davon, wie du magst; alles zählt.",
            "Eine Minute davon ist besser als keine.",
            "Wenn du so weit bist, darf der erste Schritt winzig sein.",
        ),
        "finisher": (
            "Du bringst die Dinge meistens zu Ende, also schaffst du auch das.",
            "So etwas hast du schon oft erledigt.",
            "Wieder eins mehr auf der Liste der erledigten Dinge.",
            "Dinge zu Ende zu bringen liegt dir, also nur zu.",
            "In deinem Tempo ist das bald geschafft.",
            "Du weißt, wie gut es sich anfühlt, fertig zu sein.",
        ),
        "mixed": (
            "Es wird guttun, das von deiner Liste zu streichen.",
            "Danach ist deine Liste kürzer.",
            "Mach es jetzt, dann hast du den Kopf frei.",
            "Gib der Sache ein paar Minuten und schau, wie weit du kommst.",
            "Ein Teil davon heute macht den morgigen Tag leichter.",
            "Vielleicht geht es schneller, als du denkst.",
        ),
        "hesitant": (
            "Fang einfach mit dem kleinsten Teil an.",
            "Es muss nicht perfekt sein; ein Anfang genügt.",
            "Stell dir einen Wecker auf fünf Minuten und hör auf, wenn er klingelt.",
            "Schau es dir an und erledige eine einzige Sache.",
            "Frag dich, wie die ersten zwei Minuten aussehen.",
            "Schreib den ersten Schritt auf und mach nur den.",
        ),
    },
    good_hour="Gegen {} Uhr passt es dir meistens gut.",
    hour="{}",
    good_midnight="Gegen Mitternacht passt es dir meistens gut.",
    note="Deine Notiz: {}{}",
)

AMERICAN = msgspec.structs.replace(
    ENGLISH, on_date="on {month} {day}", on_date_of_year="on {month} {day}, {year}", twelve_hours=True
)
LANGUAGES = {"en": ENGLISH, "en-us": AMERICAN, "de": GERMAN}


def phrases_of(locale: str) -> Phrases:
    """The phrases for the language and region of a BCP 47 tag, else for the language, else English."""
    language, *others = locale.lower().split("-")
    found = [LANGUAGES[name] for name in (f"{language}-{other}" for other in others) if name in LANGUAGES]
    return found[0] if found else LANGUAGES.get(language, ENGLISH)
