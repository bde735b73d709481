"""The template's phrases in English."""

from __future__ import annotations

from app.generation.languages.phrases import Phrases

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
    weekdays=("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    months=(
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ),
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
