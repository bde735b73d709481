"""The languages that tips are worded in without a model: a module of phrases for each, and how one is chosen.

To add one: a module like its neighbours, and its name in `LANGUAGES`. Every phrase stands for itself, so that no
grammar is put together from parts.
"""

from __future__ import annotations

from app.generation.languages.english import ENGLISH
from app.generation.languages.german import GERMAN
from app.generation.languages.phrases import Phrases

LANGUAGES = {"en": ENGLISH, "de": GERMAN}
DEFAULT = "en"


def phrases_of(locale: str) -> Phrases:
    """The phrases for a BCP 47 tag: of its language, whatever the region; English where there are none."""
    return LANGUAGES.get(locale.partition("-")[0].lower(), LANGUAGES[DEFAULT])
