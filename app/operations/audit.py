"""The audit trail: what admins did, and in which order it is recorded.

Invariant: no action begins before the trail holds it. The intent is committed first, as an entry with the outcome
`begun`; if it cannot be stored, the action is refused. The outcome is stored when the action ends. An entry that stays
`begun` belongs to an action whose end could not be recorded (a crash, a full disk).

The entry is made once the request is understood: actor, action and subject are known. An unreadable request has none.
No entry holds a user id, only its hash.
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
    """An action of an admin. `outcome` begins with `begun`, `refused: ` or `failed: `; any other text means done."""

    id: int
    at_ms: int
    actor: str
    action: str
    subject: str
    outcome: str


class AuditFilter(NamedTuple):
    """Which entries to select; None selects all."""

    actor: str | None = None
    action: str | None = None
    subject: str | None = None


class AuditTrail(Protocol):
    """The stored entries, which are never deleted. Raises `StoreUnavailable`."""

    async def begin(self, at_ms: int, actor: str, action: str, subject: str, outcome: str = BEGUN) -> int:
        """Store a new entry and return its id."""
        ...

    async def settle(self, entry_id: int, outcome: str) -> None:
        """Replace the outcome of an entry."""
        ...

    async def page(self, wanted: AuditFilter, before: int, limit: int) -> list[AuditEntry]:
        """Entries with an id below `before`, newest first."""
        ...

    async def actors(self) -> list[str]:
        """The actors of recent entries."""
        ...

    async def actions(self) -> list[str]:
        """The actions of recent entries."""
        ...


@dataclass(slots=True)
class AuditedAction:
    """An action in progress. Set `outcome` to replace the one that follows from how the action ends."""

    outcome: str | None = None


@asynccontextmanager
async def audited(trail: AuditTrail, at_ms: int, actor: str, action: str, subject: str) -> AsyncIterator[AuditedAction]:
    """Record the action that the block performs. An error in it is recorded as its outcome and raised again.

    Raises:
        StoreUnavailable: the intent cannot be stored; the action has not begun.
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
        # The action has ended and its answer stands. The entry stays `begun`, which the page explains.
        log.error("audit_outcome_lost", entry=entry_id, outcome=outcome[:MAX_OUTCOME], error=str(error))


def state_of(outcome: str) -> str:
    """`begun`, `refused`, `failed` or `done`."""
    kind = outcome.partition(":")[0]
    return kind if kind in (BEGUN, "refused", "failed") else DONE


def reason_problem(reason: str) -> str | None:
    """Why a reason given by an admin is not allowed; None if it is allowed."""
    if len(reason) > MAX_REASON:
        return f"must be at most {MAX_REASON} characters, has {len(reason)}"
    return "must not contain control characters" if _CONTROL.search(reason) else None
