"""What a language brings to word a tip: whole sentences with places for a task, a time and a quotation.

`{}` in a phrase is what its comment says. Must not know when which is used; `app.generation.template` decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from app.generation.profile_traits import Mood


@dataclass(frozen=True, slots=True, kw_only=True)
class Phrases:
    """One language. Phrases of time stand as they do within `due` and `was_due`."""

    quotes: tuple[str, str]
    unnamed: str  # a task whose title cannot be read, at the beginning of a sentence

    waiting: str  # {}: task
    waiting_important: str  # {}: task
    due: str  # {}: task, time
    was_due: str  # {}: task, time
    important: str  # {}: a sentence of the above

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
    note: str  # {}: quotation, and the sentence's end after it
