"""Rebuilds of many users, as runs that a worker carries out piece by piece.

A run is a row: what it covers, how far it is, and its state. Invariants: at most one run of a scope is queued or
running; a run continues after its last recorded position in any worker; a cancelled run stops at the next chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from app.errors import CacheUnavailable
from app.features.clock import Clock
from app.features.registry import Registry
from app.profiles.ports import NewestEvents
from app.profiles.rebuild.rebuilder import Rebuilder
from app.telemetry import logger

CHUNK = 128
log = logger("profiles.rebuild_runs")
State = Literal["queued", "running", "completed", "cancelled", "failed"]
ACTIVE = ("queued", "running")
EVERYONE = "all"


class RebuildRun(NamedTuple):
    """One run. `user_ids` None: every eligible user, or a list that was not asked for; `everyone` tells.

    `position` is the last user done, or the count of a list.
    """

    id: str
    scope: str
    user_ids: list[str] | None
    features: list[str]
    state: State
    done: int
    total: int
    position: str
    requested_by: str
    created_at_ms: int
    started_at_ms: int | None
    touched_at_ms: int
    finished_at_ms: int | None
    error: str | None

    @property
    def everyone(self) -> bool:
        """Whether it covers every eligible user."""
        return self.scope == EVERYONE

    @property
    def active(self) -> bool:
        """Whether it is queued or running."""
        return self.state in ACTIVE


class RebuildRepository(Protocol):
    """Where runs are kept. Raises `StoreUnavailable`."""

    async def open(self, run: RebuildRun) -> RebuildRun | None:
        """Keep a new run; None, or the run of the same scope that is active already."""
        ...

    async def get(self, run_id: str) -> RebuildRun | None:
        """One run."""
        ...

    async def newest(self, limit: int) -> list[RebuildRun]:
        """Newest first, without their lists of users."""
        ...

    async def untouched(self, before_ms: int, after_ms: int) -> list[str]:
        """Active runs that were touched last before a moment, or, as the clock has it, after another in the future."""
        ...

    async def advance(self, run_id: str, done: int, position: str, now_ms: int) -> State:
        """Record progress; the state, which may have become `cancelled`."""
        ...

    async def finish(self, run_id: str, state: State, now_ms: int, error: str | None) -> bool:
        """End an active run; False where it had ended before."""
        ...


def scope_of(user_ids: Sequence[str] | None) -> str:
    """Two runs with the same scope may not be active together."""
    if user_ids is None:
        return EVERYONE
    return "users:" + hashlib.sha256("/".join(sorted(set(user_ids))).encode()).hexdigest()[:16]


class RebuildRunner:
    """Carries runs out."""

    def __init__(
        self, *, book: RebuildRepository, rebuilder: Rebuilder, users: NewestEvents, registry: Registry, clock: Clock
    ) -> None:
        self._book = book
        self._rebuilder = rebuilder
        self._users = users
        self._registry = registry
        self._clock = clock

    async def total(self, user_ids: Sequence[str] | None, mask: int) -> int:
        """How many users a run of these features will cover."""
        return await self._users.count_eligible(self._since_ms(mask)) if user_ids is None else len(user_ids)

    async def run(self, run_id: str, budget_s: float) -> bool:
        """Go on with a run for about `budget_s` seconds; False where there is more to do.

        Raises:
            Unavailable: try again later; the run goes on from where it was.
        """
        run = await self._book.get(run_id)
        if run is None or run.state not in ACTIVE:
            return True
        deadline = self._clock.monotonic() + budget_s
        done, position = run.done, run.position
        mask = self._registry.known_mask(run.features)
        if not mask:
            reason = f"this release knows none of {', '.join(run.features)}"
            await self._book.finish(run_id, "failed", self._clock.now_ms(), reason)
            return True
        while page := await self._page(run, mask, position):
            if await self._book.advance(run_id, done, position, self._clock.now_ms()) not in ACTIVE:
                return True
            await self._rebuilder.rebuild([user for user in page if user], mask)  # an erased one left an empty place
            if not self._rebuilder.keeps:
                raise CacheUnavailable("the cache is away; nothing that is rebuilt would be kept")
            done += len(page)
            position = page[-1] if run.user_ids is None else str(done)
            if await self._book.advance(run_id, done, position, self._clock.now_ms()) not in ACTIVE:
                return True
            if self._clock.monotonic() > deadline:
                return False
        await self._book.finish(run_id, "completed", self._clock.now_ms(), None)
        log.info("rebuild_completed", rebuild=run_id, users=done)
        return True

    async def _page(self, run: RebuildRun, mask: int, position: str) -> list[str]:
        if run.user_ids is None:
            return await self._users.eligible(position, self._since_ms(mask), CHUNK)
        start = int(position or 0)
        return run.user_ids[start : start + CHUNK]

    def _since_ms(self, mask: int) -> int:
        return self._clock.now_ms() - self._registry.longest_window_ms(mask)
