"""Words a tip without a language model, from ready-made sentences of the request's language.

Invariants: every request gets a text; equal requests of one day get equal texts; and text quoted from the task cannot
break the sentence around it. Days and times are local to the UTC offset of `due_at`.
"""

import re
from datetime import datetime
from zlib import crc32

from app.generation.languages import Phrases, phrases_of
from app.generation.text_rules import cleaned, first_sentence, is_readable, shortened
from app.generation.tip_request import TipRequest

TITLE_CHARS, NOTE_CHARS = 100, 80
_QUOTES = re.compile('["“”„‟«»「」『』]')


def template_tip(request: TipRequest) -> str:
    """Word a tip: a sentence about the task, an encouragement, the user's preferred hour, and the first sentence of
    the task's notes. Users who read tips only briefly get just the sentence about the task and the encouragement."""
    phrases, traits = phrases_of(request.locale), request.traits
    variants = phrases.encouragement[traits.mood]
    # Another sentence on another day and for another task, so that a list of tips does not repeat itself.
    chosen = crc32(f"{request.now.date()} {request.title}".encode("utf-8", "surrogatepass")) % len(variants)
    sentences = [_opening(phrases, request), variants[chosen]]
    if traits.reads != "briefly":
        soon = request.due_at is not None and _days(request.due_at, request.now) <= 1
        if traits.hour is not None and not soon:  # a task that is due soon does not wait for the preferred hour
            hour = _clock(traits.hour) if phrases.twelve_hours else phrases.hour.format(traits.hour)
            sentences.append(phrases.good_hour.format(hour) if traits.hour else phrases.good_midnight)
        if note := first_sentence(request.notes or "", NOTE_CHARS):
            stop = "" if note.endswith(("!", "?", "…")) else "."
            sentences.append(phrases.note.format(_quoted(phrases, note), stop))
    return " ".join(sentences)


def is_important(request: TipRequest) -> bool:
    return request.priority is not None and request.priority >= 3.0


def _opening(phrases: Phrases, request: TipRequest) -> str:
    title, due, now = shortened(cleaned(request.title), TITLE_CHARS), request.due_at, request.now
    subject = _quoted(phrases, title) if is_readable(title) else phrases.unnamed
    if due is None:
        return (phrases.waiting_important if is_important(request) else phrases.waiting).format(subject)
    past = due < now if _has_time(due) else _days(due, now) < 0
    sentence = (phrases.was_due if past else phrases.due).format(subject, _when(phrases, due, now))
    return phrases.important.format(sentence) if is_important(request) else sentence


def _quoted(phrases: Phrases, text: str) -> str:
    """Put the text in the language's quotation marks. Marks within it become `'`, so that none ends the quotation."""
    return _QUOTES.sub("'", text).join(phrases.quotes)


def _when(phrases: Phrases, due: datetime, now: datetime) -> str:
    """Word the due date: by the day's name if it is near, otherwise by date; with the time, unless the day is over."""
    days = _days(due, now)
    if days in (-1, 0, 1):
        day = (phrases.today, phrases.tomorrow, phrases.yesterday)[days]
    elif 1 < days <= 6:  # the name of a weekday further away could mean another week
        day = phrases.on_weekday.format(phrases.weekdays.split()[due.weekday()])
    else:
        same_year = due.year == now.astimezone(due.tzinfo).year
        phrase, month = phrases.on_date if same_year else phrases.on_date_of_year, phrases.months.split()[due.month - 1]
        day = phrase.format(day=due.day, month=month, year=due.year)
    if days < 0 or not _has_time(due):
        return day
    minute = f":{due.minute:02d}"
    return phrases.at.format(day, _clock(due.hour, minute) if phrases.twelve_hours else f"{due.hour}{minute}")


def _clock(hour: int, minute: str = "") -> str:
    """The time on a clock of twelve hours, such as `5 PM` or `5:30 PM`."""
    return f"{hour % 12 or 12}{minute} {'AM' if hour < 12 else 'PM'}"


def _has_time(due: datetime) -> bool:
    """Whether the due date has a time of day; midnight stands for the whole day."""
    return bool(due.hour or due.minute)


def _days(due: datetime, now: datetime) -> int:
    """The number of midnights from now to `due`, local to the offset of `due`."""
    return (due.date() - now.astimezone(due.tzinfo).date()).days
