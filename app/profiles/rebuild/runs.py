"""Rebuilds of many users, as runs that a worker carries out chunk by chunk.

A run is a row with its scope (which users), position and state. Invariants: at most one run of a scope is queued or
running. Any worker can continue a run after its last recorded position. A cancelled run stops at the next chunk.
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
    """A rebuild of many users, as stored, with its progress. `scope` says which users; see `scope_of`.

    `user_ids` is None if the run rebuilds all eligible users (`everyone`), or if the row was read without its list of
    users. `position` is the id of the last user done or, if the run has a list, how many users of the list are done.
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
        return self.scope == EVERYONE

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


class RebuildRepository(Protocol):
    """Stores rebuild runs. Raises `StoreUnavailable`."""

    async def open(self, run: RebuildRun) -> RebuildRun | None:
        """Store a new run and return None. If a run of the same scope is active, store nothing and return that run."""

    async def get(self, run_id: str) -> RebuildRun | None: ...

    async def newest(self, limit: int) -> list[RebuildRun]:
        """Up to `limit` runs, newest first, without their lists of users."""

    async def untouched(self, before_ms: int, after_ms: int) -> list[str]:
        """Ids of active runs that made no progress since `before_ms`. Runs with progress recorded after `after_ms` are
        included: that time was read from a clock that was ahead."""

    async def advance(self, run_id: str, done: int, position: str, now_ms: int) -> State:
        """Record the progress of a run; return its state, which may have become `cancelled`."""

    async def finish(self, run_id: str, state: State, now_ms: int, error: str | None) -> bool:
        """Set the final state of an active run; return False if the run had ended before."""


def scope_of(user_ids: Sequence[str] | None) -> str:
    """A text that identifies a set of users, so that two runs for the same users are recognised; `all` for None."""
    if user_ids is None:
        return EVERYONE
    return "users:" + hashlib.sha256("/".join(sorted(set(user_ids))).encode()).hexdigest()[:16]


class RebuildRunner:
    def __init__(
        self, *, runs: RebuildRepository, rebuilder: Rebuilder, users: NewestEvents, registry: Registry, clock: Clock
    ) -> None:
        self._runs = runs
        self._rebuilder = rebuilder
        self._users = users
        self._registry = registry
        self._clock = clock

    async def total(self, user_ids: Sequence[str] | None, mask: int) -> int:
        return await self._users.count_eligible(self._since_ms(mask)) if user_ids is None else len(user_ids)

    async def run(self, run_id: str, budget_s: float) -> bool:
        """Continue a run for about `budget_s` seconds; return False if there is more to do.

        Raises:
            Unavailable: try again later; the run continues from its position.
        """
        run = await self._runs.get(run_id)
        if run is None or not run.active:
            return True
        deadline = self._clock.monotonic() + budget_s
        done, position = run.done, run.position
        mask = self._registry.known_mask(run.features)
        if not mask:
            reason = f"this release knows none of {', '.join(run.features)}"
            await self._runs.finish(run_id, "failed", self._clock.now_ms(), reason)
            return True
        while page := await self._page(run, mask, position):
            if await self._runs.advance(run_id, done, position, self._clock.now_ms()) not in ACTIVE:
                return True
            await self._rebuilder.rebuild([user for user in page if user], mask)  # an erased user left an empty id
            if not self._rebuilder.keeps:
                raise CacheUnavailable("the cache is unavailable; rebuilt values would not be kept")
            done += len(page)
            position = page[-1] if run.user_ids is None else str(done)
            if await self._runs.advance(run_id, done, position, self._clock.now_ms()) not in ACTIVE:
                return True
            if self._clock.monotonic() > deadline:
                return False
        await self._runs.finish(run_id, "completed", self._clock.now_ms(), None)
        log.info("rebuild_completed", rebuild=run_id, users=done)
        return True

    async def _page(self, run: RebuildRun, mask: int, position: str) -> list[str]:
        if run.user_ids is None:
            return await self._users.eligible(position, self._since_ms(mask), CHUNK)
        start = int(position or 0)
        return run.user_ids[start : start + CHUNK]

    def _since_ms(self, mask: int) -> int:
        return self._clock.now_ms() - self._registry.longest_window_ms(mask)
