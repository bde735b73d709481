"""The languages in which the template can word tips.

To add a language, write a module like `english` and add it to `LANGUAGES`. Each phrase is a whole sentence or
adverbial, so that the code needs no rules of grammar.
"""

from __future__ import annotations

from app.generation.languages.english import ENGLISH
from app.generation.languages.german import GERMAN
from app.generation.languages.phrases import Phrases

LANGUAGES = {"en": ENGLISH, "de": GERMAN}
DEFAULT = "en"


def phrases_of(locale: str) -> Phrases:
    """The phrases for the language of a BCP 47 tag, whatever its region; English if the language is not supported."""
    return LANGUAGES.get(locale.partition("-")[0].lower(), LANGUAGES[DEFAULT])
