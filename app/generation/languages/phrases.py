"""The phrases that the template needs in each language. A comment on each line says what its `{}` stands for."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from app.generation.profile_traits import Mood


class Phrases(msgspec.Struct, frozen=True, kw_only=True):
    """The template's phrases in one language. The phrases from `today` to `on_date_of_year` replace the second `{}` of
    `due` and `was_due`."""

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
    weekdays: tuple[str, ...]  # Monday first
    months: tuple[str, ...]

    encouragement: Mapping[Mood, str]
    good_hour: str  # {}: hour, 1 to 23
    good_midnight: str
    note: str  # {}: quotation, and the full stop after it
