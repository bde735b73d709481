"""What wording a tip needs: an order and a writer.

An order carries what may be said and nothing else: it has no field for a user, so no writer can tell whom it is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from app.generation.profile_traits import Traits


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task, as its owner wrote it: untrusted. A higher `priority` matters more; `due_at` is aware."""

    title: str
    notes: str | None = None
    due_at: datetime | None = None
    priority: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A tip to be worded. `locale` is a BCP 47 tag, `now` the aware time at which it is read."""

    task: Task
    traits: Traits
    locale: str
    now: datetime


class Writer(Protocol):
    """Words tips. Stateless as far as its caller can tell: any number of orders may be under way."""

    async def write(self, order: Order) -> str:
        """The text of a tip, not checked yet.

        Raises:
            ModelFailed: there is none, and why. Nothing else, and within a bounded time.
        """
        ...
