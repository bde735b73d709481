"""The template's phrases in German, which address the user informally with `du`."""

from __future__ import annotations

from app.generation.languages.phrases import Phrases

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
    weekdays=("Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"),
    months=(
        "Januar",
        "Februar",
        "März",
        "April",
        "Mai",
        "Juni",
        "Juli",
        "August",
        "September",
        "Oktober",
        "November",
        "Dezember",
    ),
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
