"""Cleans the text of tasks, and checks the text of tips.

Invariant: a text for which `text_problem` returns None is one paragraph of 1 to `MAX_TEXT` characters that is displayed
as it is: no character moves the cursor, changes the writing direction or is invisible.
"""

import re
import unicodedata

MAX_TEXT = 500
# Control characters, direction overrides and isolates, surrogates, and invisible characters. Tag characters and
# variation selectors can spell words that a model reads and a person does not see; fillers are invisible letters.
# Joiners, direction marks and the two emoji variation selectors are allowed, since languages need them.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u115f\u1160\u180e\u200b\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0d\ufeff\uffa0"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f\U000e0100-\U000e01ef]"
)
_LINK = re.compile(r"[a-z][a-z0-9+.-]*://|\bwww\.|\]\(", re.IGNORECASE)
_MARKS = "-*#>•·–— \t"
_STOPS = ".,;:"
_BOLD = re.compile(r"\*\*([^*]+)\*\*")
_CHECKBOX = re.compile(r"^\[[ xX]?\]\s*")
# A full stop after a number or a short word usually ends a date or an abbreviation, not a sentence.
_END = re.compile(
    r"(?:[!?…]|(?<=[^\W\d_]{4})(?<!\bprof)(?<!\binkl)(?<!\bevtl)(?<!\bdept)(?<!\bsept)(?<!\bapprox)\.)\s", re.IGNORECASE
)


def single_spaced(text: str) -> str:
    """The text in one line, with each sequence of white space replaced by a single space."""
    return " ".join(text.split())


def cleaned(text: str) -> str:
    """A task's text in one line without hidden characters; may be empty."""
    return single_spaced(_HIDDEN.sub("", single_spaced(text)))


def shortened(text: str, most: int) -> str:
    """The text cut to at most `most` characters, between words if possible, and then ending in `…`."""
    if len(text) <= most:
        return text
    cut = text[: most - 1]
    space = cut.rfind(" ")
    if space > most // 2:
        cut = cut[:space]
    return cut.rstrip(f"{_STOPS} \u200d") + "…"  # a joiner would attach to the mark


def first_sentence(notes: str, most: int) -> str:
    """The first sentence of a task's notes that contains a word, without Markdown marks of lists, checkboxes and bold
    text, cut to at most `most` characters; empty if there is none."""
    for line in notes.splitlines():
        text = _CHECKBOX.sub("", cleaned(_BOLD.sub(r"\1", line)).lstrip(_MARKS))
        if _has_word(text):
            return shortened(_sentence(text).rstrip(f"{_STOPS} "), most)
    return ""


def _sentence(text: str) -> str:
    begin = 0
    for end in _END.finditer(text):
        continues = end[0][0] == "." and text[end.end() : end.end() + 1].islower()
        if not continues and _has_word(text[begin : end.start()]):
            return text[begin : end.start() + 1]
        if not continues:
            begin = end.end()
    return text[begin:]


def _has_word(text: str) -> bool:
    return any(map(str.isalnum, text))


def is_readable(title: str) -> bool:
    """Whether the title contains a letter, a digit or a symbol such as an emoji, and not only punctuation."""
    return any(unicodedata.category(character)[0] not in "PZCM" for character in title)


def text_problem(text: str, *, may_link: bool = False) -> str | None:
    """The reason why a text cannot be shown as a tip, such as `it has a link`; None if it can be shown."""
    problems = {
        "it contains no word": not _has_word(text),
        f"it has more than {MAX_TEXT} characters": len(text) > MAX_TEXT,
        "it is not one paragraph": text != single_spaced(text),
        "it has a hidden character": _HIDDEN.search(text) is not None,
        "it has a link": not may_link and has_link(text),
    }
    return next((problem for problem, found in problems.items() if found), None)


def has_link(text: str) -> bool:
    """Whether the text contains a URL or a Markdown link, which many programs make clickable."""
    return _LINK.search(text) is not None
