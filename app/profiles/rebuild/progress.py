"""Watching rebuilds: whoever follows a run is told when it has changed.

Invariant: however many follow, and however many runs, a process asks the database once a tick, and not at all while
nobody follows. Whoever follows is let go when the run has ended, after `LONGEST_TICKS` (a browser comes back by
itself), and at once when the process stops.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable

from app.errors import StoreUnavailable
from app.profiles.rebuild.runs import RebuildRepository, RebuildRun
from app.telemetry import logger

TICK_S = 0.5
QUIET_TICKS = 20
LONGEST_TICKS = 120
log = logger("profiles.run_watch")


class RunProgress:
    """One a process."""

    def __init__(self, book: RebuildRepository, pause: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._book = book
        self._pause = pause
        self._followers: Counter[str] = Counter()
        self._newest: dict[str, RebuildRun] = {}
        self._tick: asyncio.Future[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def followers(self) -> int:
        """How many follow a run now."""
        return self._followers.total()

    async def follow(self, run: RebuildRun) -> AsyncGenerator[RebuildRun | None, None]:
        """The run as it was given, then as it is whenever it has changed; None after `QUIET_TICKS` without a change."""
        self._followers[run.id] += 1
        seen = run
        self._note(run)
        try:
            yield run
            quiet = 0
            for _ in range(LONGEST_TICKS):
                if self._stopped or not seen.active:
                    return
                await self._next_tick()
                newest = self._newest[run.id]
                quiet = 0 if newest != seen else quiet + 1
                if newest != seen:
                    seen = newest
                    yield seen
                elif quiet % QUIET_TICKS == 0:
                    yield None
        finally:
            self._leave(run.id)

    def stop(self) -> None:
        """Let everybody go; nobody can follow for longer than a moment from now on."""
        self._stopped = True
        self._wake()

    async def close(self) -> None:
        """Return when nothing runs any more."""
        self.stop()
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    def _leave(self, run_id: str) -> None:
        self._followers[run_id] -= 1
        if self._followers[run_id] == 0:
            del self._followers[run_id], self._newest[run_id]

    def _note(self, run: RebuildRun) -> None:
        # A look that began before a follower came may end after it, with an older state.
        known = self._newest.get(run.id)
        if known is None or run.touched_at_ms >= known.touched_at_ms:
            self._newest[run.id] = run

    async def _next_tick(self) -> None:
        loop = asyncio.get_running_loop()
        if self._looking is None:
            self._looking = loop.create_task(self._keep_looking())
        if self._tick is None:
            self._tick = loop.create_future()
        await asyncio.shield(self._tick)

    def _wake(self) -> None:
        if self._tick is not None and not self._tick.done():
            self._tick.set_result(None)
        self._tick = None

    async def _keep_looking(self) -> None:
        try:
            while self._followers and not self._stopped:
                await self._pause(TICK_S)
                await self._look()
                self._wake()
        finally:
            self._looking = None
            self._wake()

    async def _look(self) -> None:
        try:
            runs = await self._book.progress(list(self._followers))
        except StoreUnavailable as error:
            log.debug("look_failed", error=str(error))
            return
        for run in runs:
            if run.id in self._followers:
                self._note(run)
