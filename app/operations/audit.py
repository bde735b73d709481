"""The audit trail: records the actions of admins, and how they ended.

Invariant: no action begins before its entry is committed, with the outcome `begun`. The outcome is replaced when the
action ends. An entry that stays `begun` belongs to an action whose end could not be recorded, because of a crash or a
full disk. A request that cannot be parsed has no entry. An entry contains the hash of a user id, never the id.
"""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple, Protocol

import msgspec

from app.errors import ProfilesError, StoreUnavailable, Unavailable
from app.telemetry import logger

BEGUN = "begun"
MAX_OUTCOME, MAX_REASON = 600, 400
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
log = logger("audit")


class AuditEntry(NamedTuple):
    """A stored action of an admin on a subject, such as `rollout` or the hash of a user id. `outcome` begins with
    `begun`, `refused: ` or `failed: `; any other text means that the action succeeded."""

    id: int
    at_ms: int
    actor: str
    action: str
    subject: str
    outcome: str

    @property
    def state(self) -> str:
        """How the action ended: `done`, `refused` or `failed`; `begun` if that is not known."""
        kind = self.outcome.partition(":")[0]
        return kind if kind in (BEGUN, "refused", "failed") else "done"


class AuditTrail(Protocol):
    """The storage of audit entries, which are never deleted. All methods raise `StoreUnavailable`."""

    async def begin(self, at_ms: int, actor: str, action: str, subject: str, outcome: str = BEGUN) -> int:
        """Commit a new entry and return its id."""

    async def settle(self, entry_id: int, outcome: str) -> None:
        """Store how an action ended: replace the outcome of its entry."""

    async def page(
        self, before: int, limit: int, actor: str | None = None, action: str | None = None, subject: str | None = None
    ) -> list[AuditEntry]:
        """The newest `limit` entries below the id `before`, newest first, filtered by the other arguments."""


class AuditedAction(msgspec.Struct):
    """An audited action in progress. When it ends, its `outcome` is stored. If `outcome` is None, `done` is stored
    instead or, if the action raised an error, a text that begins with `refused: ` or `failed: `."""

    outcome: str | None = None


@asynccontextmanager
async def audited(trail: AuditTrail, at_ms: int, actor: str, action: str, subject: str) -> AsyncIterator[AuditedAction]:
    """Record the action that the `async with` block performs, and its outcome. An error of the block is raised again.
    Raises `StoreUnavailable` if the entry cannot be stored; the action has not begun then."""
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
    await _settle(trail, entry_id, act.outcome or "done")


async def _settle(trail: AuditTrail, entry_id: int, outcome: str) -> None:
    try:
        await trail.settle(entry_id, outcome[:MAX_OUTCOME])
    except StoreUnavailable as error:
        # The action has ended and its answer stands. The entry stays `begun`, which the page explains.
        log.error("audit_outcome_lost", entry=entry_id, outcome=outcome[:MAX_OUTCOME], error=str(error))


def reason_problem(reason: str) -> str | None:
    """What is wrong with the reason that an admin gives for an action; None if it is allowed."""
    if len(reason) > MAX_REASON:
        return f"must be at most {MAX_REASON} characters, has {len(reason)}"
    return "must not contain control characters" if _CONTROL.search(reason) else None
