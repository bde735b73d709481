"""Texts on their way in and out: what is taken away from a task's, and what a tip's must be.

Invariant: a text that `problem_of` finds nothing wrong with is one paragraph of 1 to `MAX_TEXT` characters that looks
like what it is: nothing in it moves a cursor, turns the direction, or hides.
"""

from __future__ import annotations

import re
import unicodedata

MAX_TEXT = 500
# Control characters, overrides and isolates of direction, halves of pairs, and what is drawn nowhere (tag characters
# and selectors of variants spell words that a model sees and a reader does not; fillers are letters that look like
# none). Joiners, marks of direction and the two selectors of emoji stay: languages need them.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u115f\u1160\u180e\u200b\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0d\ufeff\uffa0"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f\U000e0100-\U000e01ef]"
)
_LINK = re.compile(r"[a-z][a-z0-9+.-]*://|\bwww\.|\]\(", re.IGNORECASE)
_MARKS = "-*#>•·–— \t"
_STOPS = ".,;:"
_ENDS = "!?…"
_BOLD = re.compile(r"\*\*([^*]+)\*\*")
_CHECKBOX = re.compile(r"^\[[ xX]?\]\s*")
# A stop after a number or a short word ends a date or an abbreviation more often than a sentence.
_END = re.compile(
    r"(?:[!?…]|(?<=[^\W\d_]{4})(?<!\bprof)(?<!\binkl)(?<!\bevtl)(?<!\bdept)(?<!\bsept)(?<!\bapprox)\.)\s", re.IGNORECASE
)


def tidied(text: str) -> str:
    """The same words with single spaces and no line ends."""
    return " ".join(text.split())


def cleaned(text: str) -> str:
    """A task's text in one line, without what is not to be seen; may be empty."""
    return tidied(_HIDDEN.sub("", tidied(text)))


def shortened(text: str, most: int) -> str:
    """At most so many characters, cut between words where that is possible, and marked with `…`."""
    if len(text) <= most:
        return text
    cut = text[: most - 1]
    space = cut.rfind(" ")
    if space > most // 2:
        cut = cut[:space]
    return cut.rstrip(f"{_STOPS} \u200d") + "…"  # a joiner would join the mark


def gist(notes: str, most: int) -> str:
    """The first sentence of the first line that says something, to be quoted; empty where there is none."""
    for line in notes.splitlines():
        text = _CHECKBOX.sub("", cleaned(_BOLD.sub(r"\1", line)).lstrip(_MARKS))
        if _says_something(text):
            return shortened(_first_sentence(text).rstrip(f"{_STOPS} "), most)
    return ""


def _first_sentence(text: str) -> str:
    """The first that says something, with what ends it."""
    begin = 0
    for end in _END.finditer(text):
        goes_on = end[0][0] == "." and text[end.end() : end.end() + 1].islower()
        if not goes_on and _says_something(text[begin : end.start()]):
            return text[begin : end.start() + 1]
        if not goes_on:
            begin = end.end()
    return text[begin:]


def _says_something(text: str) -> bool:
    return any(map(str.isalnum, text))


def shows_something(title: str) -> bool:
    """Whether there is more than marks and spaces: a letter, a number, or a sign that stands for a word (emoji)."""
    return any(unicodedata.category(character)[0] not in "PZCM" for character in title)


def ended(quoted: str) -> str:
    """What ends a sentence that ends with this quotation: nothing where it brings its own end."""
    return "" if quoted.endswith(tuple(_ENDS)) else "."


def problem_of(text: str, *, may_link: bool = False) -> str | None:
    """Why a text is no tip, or None where it is one. A link is none, unless the task has one itself."""
    if not _says_something(text):
        return "it says nothing"
    if len(text) > MAX_TEXT:
        return f"it has more than {MAX_TEXT} characters"
    if text != tidied(text):
        return "it is not one paragraph"
    if _HIDDEN.search(text):
        return "it has a character that is not to be seen"
    if not may_link and links(text):
        return "it has a link"
    return None


def links(text: str) -> bool:
    """Whether there is something that programs make a link of."""
    return _LINK.search(text) is not None
