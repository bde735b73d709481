"""A request for a tip, and the protocol of a writer.

A request contains only what may be said in the tip. It has no field for a user, so no writer can learn the user's id.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from app.generation.profile_traits import Traits


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task as its owner wrote it: untrusted text. A higher `priority` matters more; `due_at` has a UTC offset."""

    title: str
    notes: str | None = None
    due_at: datetime | None = None
    priority: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TipRequest:
    """A request for a tip. `locale` is a BCP 47 tag, `now` the current time with a UTC offset."""

    task: Task
    traits: Traits
    locale: str
    now: datetime


class Writer(Protocol):
    """Writes tips; safe for concurrent calls."""

    async def write(self, request: TipRequest) -> str:
        """The text of a tip, unchecked. Returns or raises within a bounded time.

        Raises:
            ModelFailed: there is no text; the error has the reason.
        """
        ...
