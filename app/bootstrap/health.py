"""Checks a process and its servers, sets the gauges of waiting work, and stores samples of checks and gauges.

If a server does not answer, its check fails within the timeouts of the adapter; no check and no gauge raises an error.
`/readyz` needs no key, so the details of a check contain no address and no path. Those are logged.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import msgspec

from app.concurrency.tasks import repeat, running
from app.errors import CacheRefused, CacheUnavailable, QueueUnavailable, StoreUnavailable
from app.features.clock import rfc3339
from app.operations.component_states import ReadinessCheck, State
from app.operations.samples import EVERY_S, Gauges, Role, Sampler
from app.profiles.ports import Cache
from app.profiles.quality.report import QualityReport
from app.service import Service
from app.stores.queue.client import Queue, without_timeline
from app.stores.sql.database import Database
from app.stores.sql.samples import backlog
from app.telemetry import logger

FIRST_S = 0.5
GAUGES_S = 5.0  # of the ten seconds after which Prometheus drops a scrape
log = logger("health")


class HealthChecks(msgspec.Struct, frozen=True):
    """Checks the database, the cache, the queue and the features of one process, and sets its gauges."""

    service: Service
    database: Database
    cache: Cache
    queue: Queue | None

    async def readiness(self) -> dict[str, ReadinessCheck]:
        """Check every dependency now; return the checks by name, such as `database` and `worker`."""
        database, cache, queue = await asyncio.gather(self._check_database(), self._check_cache(), self._check_queue())
        return {**database, "cache": cache, **queue, "features": self._check_features()}

    async def _check_database(self) -> dict[str, ReadinessCheck]:
        try:
            owed = (await backlog(self.database, self.service.clock.now_ms())).owed
        except StoreUnavailable as error:
            detail = f"{error.public_reason}; nothing can be served"
            return {"database": _unanswered("database", detail, error, vital=True)}
        try:
            problem = await self.database.problem()
        except StoreUnavailable as error:
            log.warning("not_answering", what="database", error=str(error))
            problem = error.public_reason
        return {
            "database": ReadinessCheck(problem is None, problem or "", state="degraded"),
            "invalidations": ReadinessCheck(
                owed == 0,
                f"{owed} invalidations are owed to the cache; reads of these users compute until they are made",
                state="degraded",
            ),
        }

    async def _check_cache(self) -> ReadinessCheck:
        try:
            await self.cache.check()
        except CacheRefused as error:
            detail = f"{str(error).partition(':')[0]}; missing values are computed from the database"
            return _unanswered("cache", detail, error, state="degraded")
        except CacheUnavailable as error:
            return _unanswered("cache", f"{error.public_reason}; reads compute from the database", error)
        return ReadinessCheck(self.cache.available, "it answers again; reads compute for a moment longer")

    def _check_features(self) -> ReadinessCheck:
        """Whether this process can compute every feature. A feature that an admin disabled is not a failure."""
        self.service.computation.try_again()
        troubles = self.service.computation.availability.troubles()
        detail = "; ".join(f"{item.feature}: {item.reason}, since {rfc3339(item.since_ms)}" for item in troubles)
        return ReadinessCheck(not troubles, f"failing, and answered as null: {detail}", state="degraded")

    async def _check_queue(self) -> dict[str, ReadinessCheck]:
        if self.queue is None:
            return {"queue": ReadinessCheck(False, "no queue is set (PROFILES_QUEUE_URL); events wait for a sweep")}
        try:
            alive = await self.queue.worker_alive()
            shown = await self.queue.databases(self.service.clock.now_ms())
            others = shown - {without_timeline(self.database.id)}
        except QueueUnavailable as error:
            queue = _unanswered("queue", f"{error.public_reason}; events are kept and wait for a sweep", error)
            unknown = ReadinessCheck(False, "unknown: the queue does not answer", state="unknown")
            return {"queue": queue, "worker": unknown}
        shared = "workers of another database take jobs from it; give each service its own PROFILES_QUEUE_NAME"
        return {
            "queue": ReadinessCheck(not others, shared, state="degraded"),
            "worker": ReadinessCheck(alive, "no worker has reported in the last seconds; start `profiles worker`"),
        }

    async def refresh_gauges(self) -> Gauges:
        """Count the waiting work (jobs, events, dead letters, owed invalidations) and set the Prometheus gauges. If a
        server does not answer, its counts are None, and their gauges are not exported."""
        depth: int | None = None
        if self.queue is not None:
            with suppress(QueueUnavailable):  # readiness logs it
                depth = await self.queue.depth()
        found = Gauges()
        try:
            async with asyncio.timeout(GAUGES_S):
                found = await backlog(self.database, self.service.clock.now_ms())
                for refresh in (self._refresh_rollout, self._refresh_quality):
                    with suppress(StoreUnavailable):  # the other gauges are set all the same
                        await refresh()
        except (StoreUnavailable, TimeoutError) as error:
            log.warning("gauges_not_refreshed", error=str(error) or "the database does not answer in time")
        metrics = self.service.metrics
        for gauge, value in (
            (metrics.queue_depth, depth),
            (metrics.oldest_unconsumed, found.outbox_age_s),
            (metrics.unconsumed, found.outbox),
            (metrics.dead_letters, found.dead_letters),
            (metrics.owed, found.owed),
            (metrics.events_ahead, found.events_ahead),
            (metrics.unreadable_states, found.unreadable),
        ):
            gauge.set(value)
        return msgspec.structs.replace(found, queue_depth=depth)

    async def _refresh_rollout(self) -> None:
        if self.service.scoring is None:
            return
        from app.bandit.rollout.stages import STAGES  # noqa: PLC0415  # not imported unless there is a roll-out

        rollout, metrics = self.service.scoring.rollout, self.service.metrics
        state = await rollout.state()
        metrics.rollout_share.set(state.share if rollout.policies.challenger is not None else 0.0)
        for stage in STAGES:
            metrics.rollout_stage.labels(stage).set(stage == state.stage)

    async def _refresh_quality(self) -> None:
        run, metrics = await self.service.quality.runs.newest_completed(), self.service.metrics
        if run is None:
            return
        with suppress(msgspec.MsgspecError):  # another release wrote it
            features = msgspec.json.decode(run.body or "", type=QualityReport).features
            metrics.quality_measured.set((run.finished_at_ms or 0) / 1000)
            gauges = (metrics.feature_psi, metrics.feature_null, metrics.feature_missing, metrics.feature_stale)
            for gauge in gauges:
                gauge.clear()  # a feature may be gone from the report
            for name, found in features.items():
                missing, stale = (count and count / found.measured for count in (found.missing, found.stale))
                for gauge, value in zip(gauges, (found.drift.psi, found.null_share, missing, stale), strict=True):
                    if value is not None:
                        gauge.labels(name).set(value)


def _unanswered(
    name: str, detail: str, error: Exception, *, vital: bool = False, state: State = "down"
) -> ReadinessCheck:
    log.warning("not_answering", what=name, error=str(error))
    return ReadinessCheck(False, detail, vital, state)


def sampler(service: Service, role: Role) -> Sampler:
    return Sampler(
        role=role,
        process=service.process,
        registry=service.registry.fingerprint,
        metrics=service.metrics,
        store=service.samples,
        ask_gauges=service.refresh_gauges,  # a scrape of a worker's metrics does not refresh them
        ask_readiness=service.readiness,
        clock=service.clock,
    )


@asynccontextmanager
async def sampling(service: Service, role: Role) -> AsyncIterator[None]:
    """Store a sample of the process's metrics every `EVERY_S` seconds, and a last one when the block ends. The first
    is taken after `FIRST_S` seconds, since the checks of readiness in a sample would delay the first requests."""
    own = sampler(service, role)
    log.info("sampling", role=role, process=service.process)

    async def keep_sampling() -> None:
        await asyncio.sleep(FIRST_S)
        await repeat("sample", own.sample, EVERY_S)

    try:
        async with running(keep_sampling()):
            yield
    finally:
        await own.close()
