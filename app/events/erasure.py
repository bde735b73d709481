"""Erases a user from the queue, the database and the cache."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from app.errors import CacheUnavailable, QueueUnavailable
from app.events.ports import Holdings, UserRecords
from app.features.clock import Clock
from app.telemetry import logger

log = logger("events.erasure")


class Erasure(msgspec.Struct, frozen=True, kw_only=True):
    """Erases users from the queue, the database and the cache. `erase_jobs` removes a user's events from waiting queue
    jobs. `settle` deletes the cache keys that the database records for deletion; erasing a user's rows records the
    user's keys. `drop_cached` deletes the user's keys under every cache epoch, current or not."""

    users: UserRecords
    erase_jobs: Callable[[str], Awaitable[object]]
    settle: Callable[[], Awaitable[object]]
    drop_cached: Callable[[str], Awaitable[None]]
    clock: Clock

    async def erase(self, user_id: str) -> Holdings:
        """Erase a user; return how much the database held of the user.

        Raises:
            QueueUnavailable: the user is erased except for queue jobs.
            StoreUnavailable: the user is not erased, or not completely; repeat it.
        """
        # The queue comes first: a job that a worker takes meanwhile is in the database before the rows are deleted.
        unavailable: QueueUnavailable | None = None
        try:
            await self.erase_jobs(user_id)
        except QueueUnavailable as error:
            log.warning("jobs_not_erased", error=str(error))
            unavailable = error
        erased = await self.users.erase(user_id, self.clock.now_ms())
        await self.settle()
        await self.users.erase_decisions(user_id)
        try:
            await self.drop_cached(user_id)
        except CacheUnavailable as error:  # no process reads the keys of earlier epochs, and they expire
            log.warning("earlier_values_not_erased", error=str(error))
        if unavailable is not None:
            reason = unavailable.public_reason
            raise QueueUnavailable(
                f"the user is erased except for jobs in the queue: {reason}; erase again when it answers"
            )
        return erased
