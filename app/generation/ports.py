"""The request for a tip's text, and the protocol of the writer that words it.

A request contains only data that the tip may mention. It has no user id, so no writer can learn the user's id.
"""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

import msgspec

from app.generation.profile_traits import Traits


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A to-do task as its owner wrote it: untrusted text. A higher `priority` means a more important task. `due_at` has
    a UTC offset."""

    title: str
    notes: str | None = None
    due_at: datetime | None = None
    priority: float | None = None


class TipRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request to word a tip about a task. `locale` is a BCP 47 tag, `now` the current time with a UTC offset."""

    task: Task
    traits: Traits
    locale: str
    now: datetime


class Writer(Protocol):
    """Words tips, for example by calling a language model; safe for concurrent calls."""

    async def write(self, request: TipRequest) -> str:
        """Word a tip; the caller checks the text. Return or raise within a bounded time.

        Raises:
            ModelFailed: the writer has no text; the error has the reason.
        """
