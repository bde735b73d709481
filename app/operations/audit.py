"""The audit trail: what admins did, and the order in which that is written down.

Invariant: nothing is done that the trail does not hold. The intent is committed before the action begins, as an entry
whose outcome is `begun`; where that cannot be written, the action is refused. The outcome follows when the action is
over. An entry that still says `begun` is of an action whose end could not be recorded (a crash, a full disk).

An action begins where it is understood: who asks, what for, and on what. A request that cannot be read is none.
No entry holds a user's id, only its hash.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from app.errors import ProfilesError, StoreUnavailable, Unavailable
from app.telemetry import logger

BEGUN = "begun"
DONE = "done"
MAX_OUTCOME = 600
MAX_REASON = 400
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
log = logger("audit")


class AuditEntry(NamedTuple):
    """Who did what to whom, when, and what came of it: `begun`, `refused: why`, `failed: why`, else it was done."""

    id: int
    at_ms: int
    actor: str
    action: str
    subject: str
    outcome: str


class AuditFilter(NamedTuple):
    """Which entries are looked for; None: all."""

    actor: str | None = None
    action: str | None = None
    subject: str | None = None


class AuditTrail(Protocol):
    """Where entries are kept, for good. Raises `StoreUnavailable`."""

    async def begin(self, at_ms: int, actor: str, action: str, subject: str, outcome: str = BEGUN) -> int:
        """Keep a new entry; its id."""
        ...

    async def settle(self, entry_id: int, outcome: str) -> None:
        """Say what came of it."""
        ...

    async def page(self, wanted: AuditFilter, before: int, limit: int) -> list[AuditEntry]:
        """Newest first, of those with a lower id."""
        ...

    async def actors(self) -> list[str]:
        """The actors of recent entries."""
        ...

    async def actions(self) -> list[str]:
        """Everything that was done lately."""
        ...


@dataclass(slots=True)
class AuditedAction:
    """An action under way. `outcome` is what the entry will say of it; None leaves that to how it ends."""

    outcome: str | None = None


@asynccontextmanager
async def audited(trail: AuditTrail, at_ms: int, actor: str, action: str, subject: str) -> AsyncIterator[AuditedAction]:
    """Around an action. What it raises is written down as its outcome, and raised.

    Raises:
        StoreUnavailable: the intent cannot be written; the action has not begun.
    """
    entry_id = await trail.begin(at_ms, actor, action, subject)
    act = AuditedAction()
    try:
        yield act
    except ProfilesError as error:
        kind = "failed" if isinstance(error, Unavailable) else "refused"
        await _settle(trail, entry_id, act.outcome or f"{kind}: {error}")
        raise
    except Exception as error:
        await _settle(trail, entry_id, act.outcome or f"failed: unexpected, {type(error).__name__}; see the log")
        raise
    await _settle(trail, entry_id, act.outcome or DONE)


async def _settle(trail: AuditTrail, entry_id: int, outcome: str) -> None:
    try:
        await trail.settle(entry_id, outcome[:MAX_OUTCOME])
    except StoreUnavailable as error:
        # The action is over, whatever the answer says of it; the entry stays `begun`, which the page explains.
        log.error("audit_outcome_lost", entry=entry_id, outcome=outcome[:MAX_OUTCOME], error=str(error))


def state_of(outcome: str) -> str:
    """`begun`, `refused`, `failed` or `done`."""
    kind = outcome.partition(":")[0]
    return kind if kind in (BEGUN, "refused", "failed") else DONE


def reason_problem(reason: str) -> str | None:
    """Why an admin's reason is not allowed; None if it is."""
    if len(reason) > MAX_REASON:
        return f"must be at most {MAX_REASON} characters, has {len(reason)}"
    return "must not contain control characters" if _CONTROL.search(reason) else None
