"""Stores metric samples of every process, summaries of the samples, and the component statuses derived from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress

import msgspec

from app.features.clock import DAY_MS
from app.operations.component_states import COMPONENTS, ComponentStatus, updated_statuses, worst_views
from app.operations.figures import HOUR_MS
from app.operations.samples import SUMMARY_MS, Record, Sample, sum_samples, summaries
from app.stores.sql.database import SERVICE, Connection, SqlRepository
from app.stores.sql.registries import UPDATE_SEEN

KEPT_MS = 70 * 60_000
SUMMARIES_KEPT_MS = 31 * DAY_MS
# Samples of a period are stored a little later than they are taken.
SUMMARY_DELAY_MS = 60_000
# Two sampling intervals and a little more. A process that was silent for longer does not count in the states.
LATELY_MS = 25_000

INSERT_SAMPLE = "INSERT INTO samples (at_ms, process, body) VALUES (?, ?, ?)"
# A sample from the future was taken before the clock was set back.
DELETE_OLD_SAMPLES = "DELETE FROM samples WHERE at_ms < :oldest OR at_ms > :newest"
SELECT_SAMPLES = "SELECT body FROM samples WHERE at_ms >= ? ORDER BY at_ms, id"
SELECT_SUMMARIES = """
SELECT body FROM sample_summaries WHERE at_ms >= :since UNION ALL
SELECT body FROM samples WHERE at_ms > (SELECT COALESCE(MAX(at_ms), 0) FROM sample_summaries)
"""
SELECT_UNSUMMARISED = """
SELECT body FROM samples
WHERE at_ms > (SELECT COALESCE(MAX(at_ms), 0) FROM sample_summaries) AND at_ms < :end ORDER BY at_ms, id
"""
INSERT_SUMMARY = "INSERT INTO sample_summaries (at_ms, role, body) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
DELETE_OLD_SUMMARIES = "DELETE FROM sample_summaries WHERE at_ms < :oldest OR at_ms > :newest"
SELECT_LATELY = "SELECT process, body FROM samples WHERE at_ms BETWEEN ? AND ? ORDER BY id"
SELECT_STATUSES = "SELECT component, state, detail, since_ms, seen_ms FROM component_states"
UPSERT_STATUS = """
INSERT INTO component_states (component, state, detail, since_ms, seen_ms) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (component) DO UPDATE SET
    state = excluded.state, detail = excluded.detail, since_ms = excluded.since_ms, seen_ms = excluded.seen_ms
"""

_decode = msgspec.json.Decoder(Sample).decode


class SqlSamples(SqlRepository):
    """Samples, kept for 70 minutes, summaries of them, kept for 31 days, and component statuses.

    Implements `app.operations.samples.SampleStore`.
    """

    async def keep(self, sample: Sample) -> None:
        """Store a sample, delete old ones, and derive the status of each component (cache, queue, …) from the newest
        samples. All in one transaction, so that no process derives statuses while another adds a sample."""
        body = msgspec.json.encode(sample).decode()

        def work(connection: Connection) -> None:
            now_ms = sample.at_ms
            connection.execute(INSERT_SAMPLE, (now_ms, sample.process, body))
            _summarise(connection, now_ms)
            connection.execute(DELETE_OLD_SAMPLES, {"oldest": now_ms - KEPT_MS, "newest": now_ms + KEPT_MS})
            seen = worst_views(found.components for found in running(connection, now_ms))
            connection.executemany(UPSERT_STATUS, updated_statuses(_statuses(connection), seen, now_ms))
            connection.execute(UPDATE_SEEN, {"now": now_ms, "fingerprint": sample.registry})

        await self._database.write(work, of=SERVICE)

    async def since(self, at_ms: int) -> Record:
        """The samples taken at or after `at_ms`, and the component statuses. They are decoded on the connection's
        thread, because an hour of samples takes some milliseconds."""

        def work(connection: Connection) -> Record:
            rows = connection.execute(SELECT_SAMPLES, (at_ms,)).fetchall()
            return Record(_samples(body for (body,) in rows), _statuses(connection))

        return await self._database.read(work)

    async def summaries(self, since_ms: int) -> list[Sample]:
        def work(connection: Connection) -> list[Sample]:
            rows = connection.execute(SELECT_SUMMARIES, {"since": since_ms}).fetchall()
            return sorted(_samples(body for (body,) in rows), key=lambda sample: sample.at_ms)

        return await self._database.read(work)


def _summarise(connection: Connection, now_ms: int) -> None:
    """Delete old summaries, and store one per role (api, worker) of each ended period that has none. A summary from the
    future was made before the clock was set back, and would hide the samples until that time."""
    connection.execute(DELETE_OLD_SUMMARIES, {"oldest": now_ms - SUMMARIES_KEPT_MS, "newest": now_ms})
    end_ms = (now_ms - SUMMARY_DELAY_MS) // SUMMARY_MS * SUMMARY_MS
    rows = connection.execute(SELECT_UNSUMMARISED, {"end": end_ms}).fetchall()
    for summary in summaries(_samples(body for (body,) in rows)):
        body = msgspec.json.encode(summary).decode()
        connection.execute(INSERT_SUMMARY, (summary.at_ms, summary.role, body))


def _statuses(connection: Connection) -> dict[str, ComponentStatus]:
    found = [ComponentStatus(*row) for row in connection.execute(SELECT_STATUSES).fetchall()]
    return {status.component: status for status in found if status.component in COMPONENTS}


def running(connection: Connection, now_ms: int) -> list[Sample]:
    """The newest sample of each process that has neither stopped nor been silent for longer than `LATELY_MS`."""
    rows = connection.execute(SELECT_LATELY, (now_ms - LATELY_MS, now_ms + LATELY_MS)).fetchall()
    return [sample for sample in _samples(dict(rows).values()) if not sample.stopped]


def hour_counts(connection: Connection, now_ms: int) -> Mapping[str, int]:
    """The sum of each count in the samples of the last hour, by its name."""
    rows = connection.execute(SELECT_SAMPLES, (now_ms - HOUR_MS,))
    return sum_samples(_samples(body for (body,) in rows)).counts


def _samples(bodies: Iterable[str]) -> list[Sample]:
    """Decode samples. Skip those that this release cannot decode: another release may write other fields."""
    found = []
    for body in bodies:
        with suppress(msgspec.MsgspecError):
            found.append(_decode(body))
    return found
