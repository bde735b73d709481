"""Computes the values that the cache does not hold, with few statements, each on a fresh snapshot of the database.

Requests that wait at the same time share a statement, of up to `CAP` users. A request joins only a statement that has
not begun, so the snapshot is never older than the request. A request for more users is split into slices that run one
after the other, so that it does not occupy every read connection.

Requests for past moments run in slices of about equal work, each on its own snapshot. They take turns slice by slice,
so a request waits for at most one slice of each other request.

A value that is not of its feature's dtype, and a feature that is unavailable (`app.profiles.availability`), is null
with the reason.
"""

import asyncio
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from random import Random
from typing import NamedTuple

import msgspec

from app.concurrency.overload import LoadEstimate
from app.concurrency.tasks import end, fail
from app.errors import StoreUnavailable, Unavailable
from app.features.clock import Clock
from app.features.ids import user_hash
from app.features.registry import Registry
from app.profiles.availability import FeatureAvailability, FeatureTrouble
from app.profiles.online.cache_protocol import LAST_EXPIRY_MS, NULL, FeatureMask, FeatureValue, Profile, not_computed
from app.profiles.ports import ComputeRow, Snapshot, Source
from app.telemetry import Metrics, logger

CAP = 128
TTL_JITTER = 0.1
MASKS_CAP = 1_024  # masks come from the names in requests, so their number must be bounded
# The longest estimated wait of a live read for its statement; and the number of users that may wait in any case.
LIVE_PATIENCE_S, LIVE_ALWAYS = 0.5, 64
# The same for past moments, counted in slices.
MOMENTS_PATIENCE_S, MOMENTS_ALWAYS = 10.0, 80
_encode = msgspec.json.Encoder().encode
log = logger("profiles.computation")


class _Statement(NamedTuple):
    """A statement that has not begun, with the mask to compute for each user id."""

    wanted: dict[str, int]
    done: asyncio.Future[dict[str, Profile]]


class Computation:
    """Computes profiles as of now, in statements that requests share, and as of past moments."""

    def __init__(
        self,
        source: Source,
        registry: Registry,
        clock: Clock,
        metrics: Metrics,
        width: int,
        random: Random,
        availability: FeatureAvailability | None = None,
    ) -> None:
        """`width`: the number of read connections. `random` draws by how much each TTL is shortened."""
        self.availability = availability or FeatureAvailability(registry, clock)
        self.source = source
        self.registry = registry
        self.clock = clock
        self.metrics = metrics
        self._random = random
        self._loop = asyncio.get_running_loop()
        self._open: _Statement | None = None  # which requests may join
        self._turn = asyncio.Semaphore(width)
        self._running: set[asyncio.Task[None]] = set()
        self._attempt: asyncio.Task[None] | None = None
        self.load = LoadEstimate(lanes=width, patience_s=LIVE_PATIENCE_S, always=LIVE_ALWAYS)
        lanes = max(1, width - 1)  # past moments leave one reader to live reads
        self._moments = LoadEstimate(lanes=lanes, patience_s=MOMENTS_PATIENCE_S, always=MOMENTS_ALWAYS)
        self._moments_turn = asyncio.Semaphore(lanes)
        self._moments_left: dict[object, int] = {}  # rows by request
        self.stopping = False  # if set, requests for past moments are rejected before their next slice
        self.masks = lru_cache(MASKS_CAP)(partial(FeatureMask, registry))
        self._fingerprints = [entry.fingerprint.encode() for entry in registry]

    @property
    def overloaded(self) -> bool:
        """Whether a live read that begins now would wait too long. Callers must check it: `live` rejects nothing."""
        return self.load.full

    def history_overloaded(self, rows: int = 1) -> bool:
        """Whether a request for `rows` past moments would wait too long."""
        # Requests take turns, so it waits for no more slices of another request than it has itself.
        slices = -(-rows // CAP)
        self._moments.waiting = sum(min(-(-left // CAP), slices) for left in self._moments_left.values())
        return self._moments.full

    async def live(self, wanted: Mapping[str, int]) -> dict[str, Profile]:
        """Compute profiles as of now, given a mask for each user id. A profile may include features that only another
        request asked for. Raises `StoreUnavailable`."""
        pairs = iter(wanted.items())
        profiles: dict[str, Profile] = {}
        self.load.waiting += (later := len(wanted))
        try:
            while piece := dict(islice(pairs, CAP)):
                self.load.waiting -= len(piece)
                later -= len(piece)
                # Shielded: a cancelled caller must not cancel a statement that others share.
                shared = await asyncio.shield(self._join(piece))
                profiles.update((user_id, shared[user_id]) for user_id in piece)
        finally:
            self.load.waiting -= later
        return profiles

    async def moments(self, asked: Sequence[ComputeRow]) -> list[Profile]:
        """Compute profiles as of past moments, one for each row of `asked`, in that order. Cancelling the call
        interrupts its statement. Raises `StoreUnavailable`, also if the process stops."""
        request = object()
        profiles: list[Profile] = []
        try:
            while left := len(asked) - len(profiles):
                self._moments_left[request] = left
                async with self._moments_turn:
                    if self.stopping:
                        raise StoreUnavailable
                    started = self.clock.monotonic()
                    piece = asked[len(profiles) : len(profiles) + CAP]
                    piece = piece[: await self.source.fitting(piece)]
                    profiles.extend(await self.compute(piece))
                    self._moments.worked(1, self.clock.monotonic() - started)
        except StoreUnavailable as error:
            if not self.stopping:
                raise
            reason = "past moments are not computed any more: this process stops; try again"
            raise StoreUnavailable(reason) from error
        finally:
            self._moments_left.pop(request, None)
        return profiles

    def _join(self, wanted: Mapping[str, int]) -> asyncio.Future[dict[str, Profile]]:
        joined = self._open
        if joined is None or len(joined.wanted) + len(wanted) > CAP:
            joined = self._open = _Statement({}, self._loop.create_future())
            task = self._loop.create_task(self._run(joined))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            # A tick after the result, so that a request for more users joins the next statement with its next slice.
            task.add_done_callback(lambda _: self._turn.release())
        before = len(joined.wanted)
        for user_id, mask in wanted.items():
            joined.wanted[user_id] = joined.wanted.get(user_id, 0) | mask
        self.load.waiting += len(joined.wanted) - before
        return joined.done

    async def _run(self, statement: _Statement) -> None:
        """Run a statement when a read connection is free, at the earliest in the next tick of the event loop."""
        try:
            await self._turn.acquire()
            if self._open is statement:
                self._open = None
            self.load.waiting -= len(statement.wanted)
            started = self.clock.monotonic()
            asked = [ComputeRow(user_id, mask) for user_id, mask in statement.wanted.items()]
            profiles = dict(zip(statement.wanted, await self.compute(asked), strict=True))
            self.load.worked(len(asked), self.clock.monotonic() - started)
            if not statement.done.done():
                statement.done.set_result(profiles)
        except BaseException as error:
            fail(statement.done, error)
            if not isinstance(error, Exception):
                raise

    def withheld(self, index: int, user_id: str) -> FeatureTrouble | None:
        """Return why a feature is paused, as `FeatureAvailability.withheld` does. If it is paused, call `try_again`."""
        trouble = self.availability.withheld(index, user_id)
        if trouble is not None:
            self.try_again()
        return trouble

    def try_again(self) -> None:
        """If the pause of a feature is over, try to compute it in the background. Only one attempt runs at a time."""
        idle = self._attempt is None or self._attempt.done()
        if idle and (due := self.availability.due()) is not None:
            self._attempt = self._loop.create_task(self._try(*due))

    async def close(self) -> None:
        if self._attempt is not None:
            await end([self._attempt])

    async def _try(self, index: int, user_id: str) -> None:
        try:
            snapshot = await self.source.attempt(self.clock.now_ms(), [ComputeRow(user_id, 1 << index)])
        except Unavailable as error:
            self.availability.pause(index, user_id, str(error), slow=True)
            return
        _, error_text = self._checked(index, snapshot.rows[0][index], snapshot.errors.get((0, index)), user_id)
        if error_text is None:
            self.availability.resume(index)
        else:
            self.availability.pause(index, user_id, error_text, slow=bool(snapshot.overdue))

    async def compute(self, asked: Sequence[ComputeRow]) -> list[Profile]:
        """Compute rows in one statement; features that are unavailable are null. Raises `StoreUnavailable`."""
        self.try_again()
        unavailable = self.availability.unavailable
        wanted, reasons = asked, {}
        if unavailable:
            wanted = [row._replace(mask=row.mask & ~unavailable) for row in asked]
            # Before the statement: a feature may be available again when the others have been computed.
            reasons = {index: self.availability.reason(index) for index in self.masks(unavailable).indices}
        at_ms = self.clock.now_ms()
        started = self.clock.monotonic()
        snapshot = await self.source.compute(at_ms, wanted)
        self.metrics.computation_seconds.observe(self.clock.monotonic() - started)
        self.metrics.computed_users.inc(len(asked))
        profiles = [self._profile(place, row, snapshot, at_ms) for place, row in enumerate(wanted)]
        if unavailable:
            for row, profile in zip(asked, profiles, strict=True):
                for index in self.masks(row.mask & unavailable).indices:
                    self.availability.withheld(index, row.user_id)
                    profile[index] = not_computed(row.now_ms or at_ms, reasons[index])
        return profiles

    def _profile(self, place: int, row: ComputeRow, snapshot: Snapshot, at_ms: int) -> Profile:
        if row.now_ms is not None:
            at_ms = row.now_ms
        raws, version = snapshot.rows[place], snapshot.versions[place]
        profile: Profile = {}
        for index in self.masks(row.mask).indices:
            json, error = self._checked(index, raws[index], snapshot.errors.get((place, index)), row.user_id)
            if error is None:
                self.availability.succeeded(index)
            elif snapshot.overdue >> index & 1:
                self.availability.pause(index, row.user_id, error, slow=True)
            else:
                self.availability.failed(index, row.user_id, error)
            expires_at_ms = None
            if row.now_ms is None and error is None:
                # Less a random share, so that values do not all expire at once.
                ttl_ms = max(1, int(self.registry[index].ttl_ms * (1 - TTL_JITTER * self._random.random())))
                expires_at_ms = min(at_ms + ttl_ms, snapshot.leaves_ms[place][index], LAST_EXPIRY_MS)
            profile[index] = FeatureValue(self._fingerprints[index], version, at_ms, expires_at_ms, json, False, error)
        return profile

    def _checked(self, index: int, raw: object, error: str | None, user_id: str) -> tuple[bytes, str | None]:
        """Encode a value from the database as JSON; return it and None. If the SQL failed with an `error`, or the value
        is not of the feature's dtype, count and log this, and return null and the error text."""
        entry = self.registry[index]
        value, wrong = entry.value_of(raw)
        error = error or wrong
        if error is None:
            return _encode(value), None
        self.metrics.computation_errors.labels(entry.name).inc()
        log.error("computation_failed", feature=entry.name, user=user_hash(user_id), error=error)
        return NULL, error
