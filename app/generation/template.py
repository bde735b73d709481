"""Words a tip without a language model, from ready-made sentences of the request's language.

Invariants: every request gets a text, equal requests get equal texts, and text quoted from the task cannot break the
sentence around it. Days and times are local to the UTC offset of `due_at`.
"""

from __future__ import annotations

import re
from datetime import datetime

from app.generation.languages import Phrases, phrases_of
from app.generation.ports import Task, TipRequest
from app.generation.text_rules import cleaned, final_stop, first_sentence, is_readable, shortened

TITLE_CHARS, NOTE_CHARS = 100, 80
IMPORTANT = 3.0
DAYS_NAMED = 6  # the name of a weekday further away could mean another week
_QUOTES = re.compile('["“”„‟«»「」『』]')


def template_tip(request: TipRequest) -> str:
    """Word a tip: a sentence about the task, an encouragement, the user's preferred hour, and the task's note.

    The hour is left out if the task is due by the end of tomorrow. Users who read tips only briefly get the first two
    sentences.
    """
    phrases, task, traits = phrases_of(request.locale), request.task, request.traits
    sentences = [_opening(phrases, task, request.now), phrases.encouragement[traits.mood]]
    if traits.reads != "briefly":
        soon = task.due_at is not None and _days(task.due_at, request.now) <= 1
        if traits.hour is not None and not soon:  # a task that is due soon does not wait for the preferred hour
            sentences.append(phrases.good_hour.format(traits.hour) if traits.hour else phrases.good_midnight)
        if note := first_sentence(task.notes or "", NOTE_CHARS):
            sentences.append(phrases.note.format(_quoted(phrases, note), final_stop(note)))
    return " ".join(sentences)


def is_important(task: Task) -> bool:
    return task.priority is not None and task.priority >= IMPORTANT


def _opening(phrases: Phrases, task: Task, now: datetime) -> str:
    title = shortened(cleaned(task.title), TITLE_CHARS)
    subject = _quoted(phrases, title) if is_readable(title) else phrases.unnamed
    if task.due_at is None:
        return (phrases.waiting_important if is_important(task) else phrases.waiting).format(subject)
    past = task.due_at < now if _has_time(task.due_at) else _days(task.due_at, now) < 0
    sentence = (phrases.was_due if past else phrases.due).format(subject, _when(phrases, task.due_at, now))
    return phrases.important.format(sentence) if is_important(task) else sentence


def _quoted(phrases: Phrases, text: str) -> str:
    """Put the text in the language's quotation marks. Marks within it become `'`, so that none ends the quotation."""
    return _QUOTES.sub("'", text).join(phrases.quotes)


def _when(phrases: Phrases, due: datetime, now: datetime) -> str:
    """Word the due date: by the day's name if it is near, otherwise by date. Today and tomorrow include the time."""
    days = _days(due, now)
    clock = f"{due.hour}:{due.minute:02d}" if _has_time(due) else None
    if days in (0, 1):
        plain, timed = (phrases.tomorrow, phrases.tomorrow_at) if days else (phrases.today, phrases.today_at)
        return plain if clock is None else timed.format(clock)
    if days == -1:
        return phrases.yesterday
    if 1 < days <= DAYS_NAMED:
        return phrases.on_weekday.format(phrases.weekdays.split()[due.weekday()])
    month = phrases.months.split()[due.month - 1]
    if due.year == now.astimezone(due.tzinfo).year:
        return phrases.on_date.format(due.day, month)
    return phrases.on_date_of_year.format(due.day, month, due.year)


def _has_time(due: datetime) -> bool:
    """Whether the due date has a time of day; midnight stands for the whole day."""
    return bool(due.hour or due.minute)


def _days(due: datetime, now: datetime) -> int:
    """The number of midnights from now to `due`, local to the offset of `due`."""
    return (due.date() - now.astimezone(due.tzinfo).date()).days
