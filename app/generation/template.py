"""A tip without a model: put together from whole phrases of one language.

Invariant: every order gets a text, the same order the same text, and what is quoted of the task cannot break the
sentence around it. A time is told as its writer's clock shows it: the offset of `due_at` decides what a day is.
"""

from __future__ import annotations

import re
from datetime import datetime

from app.generation.languages import phrases_of
from app.generation.languages.phrases import Phrases
from app.generation.ports import Order, Task
from app.generation.profile_traits import Traits
from app.generation.text_rules import cleaned, ended, gist, shortened, shows_something

TITLE_CHARS, NOTE_CHARS = 100, 80
IMPORTANT = 3.0
DAYS_NAMED = 6  # a weekday further away than this would name the wrong week
_QUOTES = re.compile('["“”„‟«»「」『』]')


def worded(order: Order) -> str:
    """The text of a tip: what is to be done, an encouragement that fits the user, and where they fit, hour and note.

    Who reads tips only briefly gets the first two.
    """
    phrases, task, traits = phrases_of(order.locale), order.task, order.traits
    sentences = [_opening(phrases, task, order.now), phrases.encouragement[traits.mood]]
    if traits.reads != "briefly":
        if (hour := _hour(traits, task, order.now)) is not None:
            sentences.append(phrases.good_hour.format(hour) if hour else phrases.good_midnight)
        if note := gist(task.notes or "", NOTE_CHARS):
            sentences.append(phrases.note.format(_quoted(phrases, note), ended(note)))
    return " ".join(sentences)


def _opening(phrases: Phrases, task: Task, now: datetime) -> str:
    title = shortened(cleaned(task.title), TITLE_CHARS)
    subject = _quoted(phrases, title) if shows_something(title) else phrases.unnamed
    important = task.priority is not None and task.priority >= IMPORTANT
    if task.due_at is None:
        return (phrases.waiting_important if important else phrases.waiting).format(subject)
    sentence = phrases.was_due if _is_past(task.due_at, now) else phrases.due
    said = sentence.format(subject, _when(phrases, task.due_at, now))
    return phrases.important.format(said) if important else said


def _quoted(phrases: Phrases, text: str) -> str:
    """In the language's own quotation marks, which end where it says so: those inside become single."""
    return _QUOTES.sub("'", text).join(phrases.quotes)


def _when(phrases: Phrases, due: datetime, now: datetime) -> str:
    """A day, by name where it is near; with the time where that matters."""
    days = _days(due, now)
    clock = f"{due.hour}:{due.minute:02d}" if _has_time(due) else None
    if days in (0, 1):
        plain, timed = (phrases.tomorrow, phrases.tomorrow_at) if days else (phrases.today, phrases.today_at)
        return plain if clock is None else timed.format(clock)
    if days == -1:
        return phrases.yesterday
    if 1 < days <= DAYS_NAMED:
        return phrases.on_weekday.format(phrases.weekdays[due.weekday()])
    month = phrases.months[due.month - 1]
    if due.year == now.astimezone(due.tzinfo).year:
        return phrases.on_date.format(due.day, month)
    return phrases.on_date_of_year.format(due.day, month, due.year)


def _hour(traits: Traits, task: Task, now: datetime) -> int | None:
    """The user's hour, unless the task does not wait for the next one."""
    soon = task.due_at is not None and _days(task.due_at, now) <= 1
    return None if soon else traits.hour


def _is_past(due: datetime, now: datetime) -> bool:
    return due < now if _has_time(due) else _days(due, now) < 0


def _has_time(due: datetime) -> bool:
    """Midnight stands for a day without a time: all of it."""
    return bool(due.hour or due.minute)


def _days(due: datetime, now: datetime) -> int:
    """Midnights from now to then, where then is."""
    return (due.date() - now.astimezone(due.tzinfo).date()).days
