"""Batches reads: the requests of one tick of the event loop form a group and share one MGET.

The misses of a group share a statement with the misses of other groups that wait for a database connection. So with n
read connections, concurrent requests for one user who is not cached run at most n + 1 statements. A request whose
values are all cached is answered at once.

Invariant: a hit is served only if no invalidation is owed in the user's hash slot (`TrustGate.check`) when the group of
the request starts, after all its requests have arrived. On PostgreSQL, this check is a query, which is answered while
the cache is read.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from app.concurrency.tasks import fail
from app.errors import CacheUnavailable, Overloaded
from app.features.ids import hash_slot
from app.profiles.online.cache_protocol import Filler, PendingCheck, Profile, ReadTime, TrustGate, decode, not_computed
from app.profiles.online.compute import Computation
from app.profiles.online.local_cache import LocalCache
from app.profiles.ports import EVERY_SLOT, UNAVAILABLE, Cache, Epoch, Held

GROUP_CAP = 256

# Masks of features by user id.
Wanted = Mapping[str, int]


class _BatchedRead(NamedTuple):
    """A request that waits for its answer. For `plain` and `patient`, see `RequestBatching.submit`."""

    wanted: Wanted
    plain: bool
    patient: bool
    done: asyncio.Future[dict[str, Any]]

    def answer(self, answer: dict[str, Any]) -> None:
        if not self.done.done():
            self.done.set_result(answer)


class RequestBatching(msgspec.Struct, kw_only=True, eq=False):
    cache: Cache
    gate: TrustGate
    computation: Computation
    filler: Filler
    local_cache: LocalCache | None = None
    _open: list[_BatchedRead] | None = None  # the group that still takes requests
    _open_users: int = 0
    # Cached: `get_running_loop()` makes a system call on Python 3.11.
    _loop: asyncio.AbstractEventLoop = msgspec.field(default_factory=asyncio.get_running_loop)
    _serving: set[asyncio.Task[None]] = msgspec.field(default_factory=set)

    async def close(self) -> None:
        """Wait until running reads are answered and computed values are stored."""
        while self._serving:
            await asyncio.gather(*self._serving, return_exceptions=True)
        await self.filler.close()

    def submit(self, wanted: Wanted, *, plain: bool, patient: bool = False) -> asyncio.Future[dict[str, Any]]:
        """Read at most `GROUP_CAP` users, together with the other requests of this tick. The future gives, by user id,
        the JSON of each feature if `plain`, else the profile. It raises `StoreUnavailable`. If values must be computed
        while too many requests wait, it raises `Overloaded`, unless the request is `patient`."""
        request = _BatchedRead(wanted, plain, patient, self._loop.create_future())
        group = self._open
        if group is None or self._open_users + len(wanted) > GROUP_CAP:
            group, self._open_users = [], 0
            self._open = group
            # It starts in the next tick of the loop and includes the requests that arrive until then.
            task = self._loop.create_task(self._serve(group))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
        group.append(request)
        self._open_users += len(wanted)
        return request.done

    async def _serve(self, waiting: list[_BatchedRead]) -> None:
        if self._open is waiting:
            self._open = None
        try:
            if not self.cache.available:
                await self._degrade(waiting, "unavailable")
            elif isinstance(check := self.gate.check(), frozenset) and EVERY_SLOT in check:
                await self._degrade(waiting, "owed")
            else:
                await self._read_and_fill(waiting, check)
        except CacheUnavailable:
            await self._degrade([request for request in waiting if not request.done.done()], "unavailable")
        except BaseException as error:
            for request in waiting:
                fail(request.done, error)
            if not isinstance(error, Exception):
                raise

    async def _read_and_fill(self, waiting: list[_BatchedRead], check: frozenset[int] | PendingCheck) -> None:
        masks = self.computation.masks
        mark = self.local_cache.cleared if self.local_cache is not None else 0
        epoch, held = await self.cache.read_rows(
            [(user_id, masks(mask).features) for request in waiting for user_id, mask in request.wanted.items()]
        )
        distrusted = check if isinstance(check, frozenset) else await check()
        if EVERY_SLOT in distrusted:
            await self._degrade(waiting, "owed")
            return
        if distrusted:
            self._withhold(distrusted, waiting, held)
        at = ReadTime.of(self.computation.clock.now_ms())
        waiting, profiles, missing = self._answer_hits(waiting, held, at, mark)
        if missing:
            await self._fill_in(epoch, missing, at, profiles, distrusted)
        self._answer(waiting, profiles)

    def _withhold(self, distrusted: frozenset[int], requests: list[_BatchedRead], held: list[bytes | None]) -> None:
        """Put `UNAVAILABLE` in place of cached values that must not be served: those of users in distrusted slots."""
        end = 0
        for user_id, mask in (item for request in requests for item in request.wanted.items()):
            start, end = end, end + self.computation.masks(mask).width
            if hash_slot(user_id) in distrusted:
                held[start:end] = [UNAVAILABLE] * (end - start)

    def _answer_hits(
        self, requests: list[_BatchedRead], held: list[bytes | None], at: ReadTime, mark: int
    ) -> tuple[list[_BatchedRead], dict[str, Profile], Held]:
        """Answer the requests whose values are all cached. If the process is overloaded, shed the others, except
        `patient` ones. Return (1) the requests that need a computation, (2) those of their values that need none, by
        user, and (3) what the keys of their other values held. For `mark`, see `LocalCache.offer`."""
        local_cache, masks = self.local_cache, self.computation.masks
        overloaded = self.computation.overloaded
        shed = 0
        waiting: list[_BatchedRead] = []
        profiles: dict[str, Profile] = {}
        missing: Held = {}
        start = 0
        for request in requests:
            wanted = request.wanted
            end = start + sum([masks(mask).width for mask in wanted.values()])
            hits = self._hits(wanted, held[start:end], at)
            if hits is not None:
                if request.plain:
                    request.answer(hits)
                else:
                    parts = self._parts(wanted, held, start)
                    request.answer({user_id: self._decoded(mask, part) for user_id, mask, part in parts})
                if local_cache is not None:
                    for user_id, mask, part in self._parts(wanted, held, start):
                        local_cache.offer(mark, user_id, mask, part, hits[user_id])
            elif overloaded and not request.patient:
                fail(request.done, Overloaded("reads"))
                shed += end - start
            else:
                waiting.append(request)
                for user_id, mask, part in self._parts(wanted, held, start):
                    profiles.setdefault(user_id, {}).update(self._found(user_id, mask, part, at, missing))
            start = end
        unavailable = sum(1 for profile in profiles.values() for value in profile.values() if value.error)
        misses = sum(map(len, missing.values()))
        self.computation.metrics.cache_hits.inc(len(held) - misses - unavailable - shed)
        self.computation.metrics.cache_misses.inc(misses)
        return waiting, profiles, missing

    def _hits(self, wanted: Wanted, held: Sequence[bytes | None], at: ReadTime) -> dict[str, Sequence[bytes]] | None:
        """The JSON of each wanted feature by user id; None unless all are hits and every user has the same mask."""
        if len(wanted) == 1:
            ((user_id, mask),) = wanted.items()
            values = self.computation.masks(mask).values(held, at)
            return {user_id: values} if values is not None else None
        masks = set(wanted.values())
        rows = self.computation.masks(masks.pop()).rows(held, at) if len(masks) == 1 else None
        return dict(zip(wanted, rows, strict=True)) if rows is not None else None

    def _parts(
        self, wanted: Wanted, held: Sequence[bytes | None], start: int
    ) -> Iterator[tuple[str, int, Sequence[bytes | None]]]:
        """Each user with the mask and the contents of the user's keys, which are in `held` from `start` on."""
        for user_id, mask in wanted.items():
            yield user_id, mask, held[start : (start := start + self.computation.masks(mask).width)]

    def _decoded(self, mask: int, held: Sequence[bytes | None]) -> Profile:
        """A user's profile from the contents of the keys, which are all hits."""
        values = zip(self.computation.masks(mask).indices, map(decode, held), strict=True)
        return {index: value for index, value in values if value is not None}

    def _found(self, user_id: str, mask: int, held: Sequence[bytes | None], at: ReadTime, missing: Held) -> Profile:
        """The part of a user's profile that needs no computation: the hits, and nulls for paused features. The contents
        of the keys of all other features are added to `missing`."""
        profile: Profile = {}
        for index, raw in zip(self.computation.masks(mask).indices, held, strict=True):
            value = self.filler.hit(index, raw, at)
            if value is not None:
                profile[index] = value
            elif (trouble := self.computation.withheld(index, user_id)) is not None:
                profile[index] = not_computed(trouble.since_ms, trouble.reason)
            else:
                missing.setdefault(user_id, {})[index] = raw
        return profile

    def _answer(self, requests: Iterable[_BatchedRead], profiles: Mapping[str, Profile]) -> None:
        for request in requests:
            answer: dict[str, Any] = {}
            for user_id, mask in request.wanted.items():
                profile, found = profiles[user_id], self.computation.masks(mask).indices
                answer[user_id] = [profile[i].json for i in found] if request.plain else {i: profile[i] for i in found}
            request.answer(answer)

    async def _degrade(self, requests: list[_BatchedRead], reason: str) -> None:
        if self.computation.overloaded:
            for request in requests:
                if not request.patient:
                    fail(request.done, Overloaded("reads"))
            requests = [request for request in requests if request.patient]
        await asyncio.gather(*(self._compute(request, reason) for request in requests))

    async def _compute(self, request: _BatchedRead, reason: str) -> None:
        """Compute the values of a request and answer it. `reason`: why the cache is not used, for the metrics."""
        wanted = request.wanted
        self.computation.metrics.degraded_reads.labels(reason).inc(len(wanted))
        try:
            profiles = await self.computation.live(wanted)
        except Exception as error:
            fail(request.done, error)
            return
        if not request.plain:  # an expiry would say that the values are cached
            profiles = {
                user_id: {index: value._replace(expires_at_ms=None) for index, value in profile.items()}
                for user_id, profile in profiles.items()
            }
        self._answer([request], profiles)

    async def _fill_in(
        self, epoch: Epoch, missing: Held, at: ReadTime, profiles: dict[str, Profile], distrusted: frozenset[int]
    ) -> None:
        """Compute the features in `missing`, a mapping to what their cache keys held. Add them to `profiles`, and store
        them in the cache after the answer. `distrusted`: the hash slots whose cached values were not used. Tokens are
        taken before the computation, as the cache protocol demands."""
        for user_id, cells in missing.items():
            if UNAVAILABLE in cells.values():
                reason = "owed" if hash_slot(user_id) in distrusted else "unavailable"
                self.computation.metrics.degraded_reads.labels(reason).inc()
        # The users are counted while their tokens are taken. Interleaving prevented: 1. many groups check for overload;
        # 2. all are admitted, since no user waits yet; 3. all get their tokens and wait for statements at once.
        self.computation.load.waiting += len(missing)
        try:
            tokens = await self.filler.tokens(epoch, missing)
        finally:
            self.computation.load.waiting -= len(missing)
        wanted: dict[str, int] = {}
        for user_id, cells in missing.items():
            for index, raw in cells.items():
                if raw is None and (value := self.filler.hit(index, tokens[user_id][index], at)) is not None:
                    profiles[user_id][index] = value  # filled by another reader since the MGET
                    del tokens[user_id][index]
                else:
                    wanted[user_id] = wanted.get(user_id, 0) | 1 << index
        if not wanted:
            return
        computed = await self.computation.live(wanted)
        for user_id in wanted:
            for index, token in tokens[user_id].items():
                value = computed[user_id][index]
                # Without an expiry, a value is not stored, and the answer does not say that it is cached.
                profiles[user_id][index] = value if token != UNAVAILABLE else value._replace(expires_at_ms=None)
        self.filler.store_later(epoch, tokens, profiles)
