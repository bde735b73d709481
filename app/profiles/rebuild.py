"""Rebuilds cached values: computes them again and replaces them, while readers keep hitting the old ones.

The token of a fill is the old cached value, which stays in the cache until the fill. If an event deletes the old value,
the fill is refused, and the rebuild tries again with a fresh token and snapshot. Invariants: a rebuilt value that was
stored was computed after the rebuild began. If a value could not be stored, because events kept coming or the cache is
unavailable, the old value is invalidated.

Rebuilds of many users are stored runs. A worker claims the next users of a run as a *part*, which moves the position of
the run, and records its progress in the part after each chunk. Invariants: at most one run of a scope is queued or
running. Several workers can work on a run, each on parts of its own. A part without progress for `STALE_MS` is claimed
by another worker, which continues after the last recorded chunk. Every user is counted once. A cancelled run stops at
the next chunk.
"""

import hashlib
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple, Protocol

import msgspec

from app.errors import CacheUnavailable
from app.features.registry import indices
from app.profiles.online.cache_protocol import FeatureValue, Filler, Profile, Tokens, failures
from app.profiles.online.compute import Computation
from app.profiles.online.invalidation import Stale
from app.profiles.ports import UNAVAILABLE, Epoch, UserQueries
from app.telemetry import logger

ATTEMPTS = 3
# A larger statement holds a core for longer than the scheduler's time slice: with 128 users, the p99 of concurrent
# reads was about twice as long and the rebuild a tenth faster.
USERS_AT_ONCE = 16
# The most users of a run that are rebuilt between two records of progress, and that a worker claims at a time.
CHUNK, PART = 128, 1_024
STALE_MS = 35_000  # much longer than a chunk takes
EVERYONE = "all"
KEPT = 100
State = Literal["queued", "running", "completed", "cancelled", "failed"]
log = logger("profiles.rebuild")


class Rebuilder(msgspec.Struct, kw_only=True, eq=False):
    """Computes features again and replaces the cached values. `invalidate`: see `Invalidator.invalidate`."""

    computation: Computation
    filler: Filler
    invalidate: Callable[[Stale], Awaitable[bool]]

    @property
    def keeps(self) -> bool:
        """Whether the cache is available, so that rebuilt values can be stored."""
        return self.filler.cache.available

    async def rebuild(self, user_ids: Sequence[str], mask: int) -> dict[str, Profile]:
        """Compute the features in `mask` for each user, store them in the cache, and return the profiles. If a value
        cannot be stored, it is returned with `expires_at_ms` None, and the cached value is invalidated. Raises
        `StoreUnavailable`."""
        profiles: dict[str, Profile] = {}
        for start in range(0, len(user_ids), USERS_AT_ONCE):
            wanted = dict.fromkeys(user_ids[start : start + USERS_AT_ONCE], mask)
            for _ in range(ATTEMPTS):
                wanted = await self._attempt(wanted, profiles)
                if not wanted or not self.keeps:
                    break
            for user_id, refused in wanted.items():
                for index in indices(refused):
                    profiles[user_id][index] = profiles[user_id][index]._replace(expires_at_ms=None)
        names = self.computation.registry.names
        stale: dict[str, list[str]] = {}
        for user_id, profile in profiles.items():
            if not_kept := [names[index] for index, value in profile.items() if _is_not_kept(value)]:
                stale[user_id] = not_kept
        if stale:
            log.info("rebuild_not_kept", users=len(stale), detail="the next read computes")
            await self.invalidate(stale)
        return profiles

    async def _attempt(self, wanted: Mapping[str, int], profiles: dict[str, Profile]) -> dict[str, int]:
        """Compute values into `profiles` and try once to store them. Return the masks of the features to try again, by
        user id. A value whose key cannot be read, because its server is unavailable, has no expiry."""
        epoch, tokens = await self._tokens(wanted)
        computed = await self.computation.live(wanted)
        for user_id, mask in wanted.items():
            profile = profiles.setdefault(user_id, {})
            for index in indices(mask):
                value = computed[user_id][index]
                away = tokens[user_id][index] == UNAVAILABLE
                profile[index] = value._replace(expires_at_ms=None) if away else value
        fills = self.filler.fills(tokens, profiles)
        refused: dict[str, int] = {}
        for fill, landed in zip(fills, await self.filler.store(epoch, fills), strict=True):
            if not landed:
                user_id, feature = fill.cell
                refused[user_id] = refused.get(user_id, 0) | self.computation.registry.mask([feature])
        return refused

    async def _tokens(self, wanted: Mapping[str, int]) -> tuple[Epoch, Tokens]:
        """The epoch, and a token for the fill of each key, by user id and feature index. If the cache is away, or not
        used, every token is `UNAVAILABLE`. `wanted` has a mask of features for each user."""
        with suppress(CacheUnavailable):
            if self.keeps:
                epoch, held = await self.filler.read(wanted)
                return epoch, await self.filler.tokens(epoch, held)
        return "", {user_id: dict.fromkeys(indices(mask), UNAVAILABLE) for user_id, mask in wanted.items()}


def _is_not_kept(value: FeatureValue) -> bool:
    return value.error is None and value.expires_at_ms is None


class RebuildRun(NamedTuple):
    """A rebuild of many users, as stored. `user_ids` is None if the run rebuilds all eligible users (`everyone`), or if
    the row was read without its list of users. Workers have claimed the users up to `position`: the id of the last such
    user or, if the run has a list, the number of such users in it. `total` is the number of users when the run was
    requested. At most `COUNTED` eligible users are counted, so `done` may exceed `total`."""

    id: str
    scope: str
    user_ids: list[str] | None
    features: list[str]
    total: int
    requested_by: str
    created_at_ms: int
    touched_at_ms: int
    state: State = "queued"
    done: int = 0
    position: str = ""
    started_at_ms: int | None = None
    finished_at_ms: int | None = None
    error: str | None = None

    @property
    def everyone(self) -> bool:
        return self.scope == EVERYONE

    @property
    def active(self) -> bool:
        return self.state in ("queued", "running")


class Part(NamedTuple):
    """The users of a run that a worker has claimed and not yet rebuilt: those after the position `after`, up to the
    position `last` (see `RebuildRun`)."""

    run_id: str
    last: str
    after: str
    claimed_at_ms: int


class RebuildRepository(Protocol):
    """Stores rebuild runs. Raises `StoreUnavailable`."""

    async def open(self, run: RebuildRun) -> RebuildRun | None:
        """Store a new run and return None. If a run of the same scope is active, store nothing and return that run."""

    async def get(self, run_id: str) -> RebuildRun | None: ...

    async def newest(self, limit: int) -> list[RebuildRun]:
        """Up to `limit` runs, newest first, without their lists of users."""

    async def active(self) -> list[str]:
        """Ids of the runs that are queued or running, oldest first."""

    async def claim(self, run_id: str, after: str, last: str, now_ms: int) -> Part | None:
        """Claim the users after the position `after`, up to `last`, as a new part, and set the run's position to
        `last`. Return None if another worker has moved the position, or if the run has ended."""

    async def claim_again(self, run_id: str, now_ms: int) -> Part | None:
        """Claim a part that its worker has released, or that made no progress for `STALE_MS`. Return None if there is
        none, or if the run has ended."""

    async def advance(self, part: Part, users: int, after: str, now_ms: int, error: str | None = None) -> Part | None:
        """Record that `users` more users of a part are done, up to the position `after`. An `error` replaces the last
        error of the run. Return the part as it is now, or None if the run has ended or another worker has the part."""

    async def release(self, part: Part) -> None:
        """Let any worker claim the rest of a part."""

    async def finish(self, run_id: str, state: State, now_ms: int, error: str | None) -> bool:
        """Set the final state of an active run, and the error unless it is None; delete all ended runs but the last
        `KEPT`. Return False if the run had ended, or if `state` is `completed` but parts are unfinished."""


def scope_of(user_ids: Sequence[str] | None) -> str:
    """A text by which two runs for the same users are recognised; `all` for None."""
    if user_ids is None:
        return EVERYONE
    return "users:" + hashlib.sha256("/".join(sorted(set(user_ids))).encode()).hexdigest()[:16]


class RebuildRunner(msgspec.Struct, kw_only=True, eq=False):
    runs: RebuildRepository
    rebuilder: Rebuilder
    users: UserQueries

    async def total(self, user_ids: Sequence[str] | None, mask: int) -> int:
        return await self.users.count_eligible(self._since_ms(mask)) if user_ids is None else len(user_ids)

    async def run(self, run_id: str, budget_s: float) -> bool:
        """Work on a run for about `budget_s` seconds; return False if there is more for this process to do. Raises
        `Unavailable`; the next call continues where it stopped."""
        registry, clock = self.rebuilder.computation.registry, self.rebuilder.computation.clock
        deadline = clock.monotonic() + budget_s
        while (run := await self.runs.get(run_id)) is not None and run.active:
            mask = registry.known_mask(run.features)
            if not mask:
                reason = f"this release knows none of {', '.join(run.features)}"
                await self.runs.finish(run_id, "failed", clock.now_ms(), reason)
                break
            part = await self.runs.claim_again(run_id, clock.now_ms())
            if part is None:
                users = await self._next_users(run, mask, run.position, PART)
                if not users:
                    if await self.runs.finish(run_id, "completed", clock.now_ms(), None):
                        log.info("rebuild_completed", rebuild=run_id, users=run.done)
                    break
                part = await self.runs.claim(run_id, run.position, users[-1][0], clock.now_ms())
            if part is not None and not await self._work_off(run, mask, part, deadline):
                return False
        return True

    async def _work_off(self, run: RebuildRun, mask: int, part: Part, deadline: float) -> bool:
        """Rebuild the users of a part. Return False if the deadline came first."""
        clock = self.rebuilder.computation.clock
        try:
            while part.after != part.last:
                users = [item for item in await self._next_users(run, mask, part.after, CHUNK) if item[0] <= part.last]
                ids = [user for _, user in users if user]  # that of an erased user is empty
                profiles = await self.rebuilder.rebuild(ids, mask)
                if not self.rebuilder.keeps:
                    raise CacheUnavailable("the cache is unavailable; rebuilt values would not be kept")
                after = users[-1][0] if len(users) == CHUNK else part.last
                error = self._error(profiles.values())
                advanced = await self.runs.advance(part, len(users), after, clock.now_ms(), error)
                if advanced is None:
                    return True
                part = advanced
                if clock.monotonic() > deadline:
                    return False
        finally:
            if part.after != part.last:
                await self.runs.release(part)
        return True

    def _error(self, profiles: Collection[Profile]) -> str | None:
        failed = failures(self.rebuilder.computation.registry, profiles)
        reasons = [f"{name} was not computed for some users: {reason}" for name, reason in failed.items()]
        if any(_is_not_kept(value) for profile in profiles for value in profile.values()):
            reasons.append("the cache did not store some values, so reads compute them")
        return "; ".join(reasons) or None

    async def _next_users(self, run: RebuildRun, mask: int, after: str, limit: int) -> list[tuple[str, str]]:
        """The next users of a run after the position `after`, at most `limit`, with their positions."""
        if run.user_ids is None:
            return [(user, user) for user in await self.users.eligible(after, self._since_ms(mask), limit)]
        start = int(after or 0)
        return [(f"{place:04}", user) for place, user in enumerate(run.user_ids[start : start + limit], start + 1)]

    def _since_ms(self, mask: int) -> int:
        computation = self.rebuilder.computation
        return computation.clock.now_ms() - computation.registry.longest_window_ms(mask)
