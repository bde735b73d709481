"""Stores metric samples of every process, summaries of the samples, and the component statuses derived from them. Also
counts the pending work and the faults in the data, for metrics, readiness and `profiles doctor`."""

from collections.abc import Iterable, Mapping
from contextlib import suppress

import msgspec

from app.features.clock import DAY_MS, HOUR_MS
from app.operations.component_states import COMPONENTS, ComponentStatus, updated_statuses, worst_views
from app.operations.samples import SUMMARY_MS, Gauges, Record, Sample, sum_samples, summaries
from app.stores.sql.database import SERVICE, Connection, Database, SqlRepository, reads, writes
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
# Put before the spec's hash in rows that are set aside (`app.stores.sql.sufficient_statistics`).
ASIDE = "unreadable "
# A range of the index by spec, so that only rows set aside are read.
SELECT_ASIDE_COUNT = f"SELECT COUNT(*) FROM bandit_states WHERE spec_hash >= '{ASIDE}' AND spec_hash < '{ASIDE[:-1]}!'"
# Events ahead are counted up to a limit: after a day with a wrong clock there can be any number of them.
SELECT_BACKLOG = f"""
SELECT (SELECT COUNT(*) FROM outbox),
       (SELECT MIN(received_at_ms) FROM outbox),
       (SELECT COUNT(*) FROM dead_letters), (SELECT COUNT(*) FROM owed_invalidations), ({SELECT_ASIDE_COUNT}),
       (SELECT COUNT(*) FROM (SELECT 1 FROM event_log WHERE occurred_at_ms > ? LIMIT 10000) AS ahead)
"""
AHEAD_MS = 300_000
SELECT_UNKNOWN = "SELECT sent_by, events FROM unknown_decisions WHERE newest_ms >= ? ORDER BY sent_by"

_decode = msgspec.json.Decoder(Sample).decode


class SqlSamples(SqlRepository):
    """Metric samples (kept for 70 minutes), their summaries (31 days), and component statuses. Implements
    `app.operations.samples.SampleStore`."""

    @writes(of=SERVICE)
    def keep(self, connection: Connection, sample: Sample) -> None:
        """Store a sample, delete old ones, and derive the status of each component (cache, queue, …) from the newest
        samples. All in one transaction, so that no process derives statuses while another adds a sample."""
        now_ms = sample.at_ms
        connection.execute(INSERT_SAMPLE, (now_ms, sample.process, msgspec.json.encode(sample).decode()))
        _summarise(connection, now_ms)
        connection.execute(DELETE_OLD_SAMPLES, {"oldest": now_ms - KEPT_MS, "newest": now_ms + KEPT_MS})
        seen = worst_views(found.components for found in running(connection, now_ms))
        connection.executemany(UPSERT_STATUS, updated_statuses(_statuses(connection), seen, now_ms))
        connection.execute(UPDATE_SEEN, {"now": now_ms, "fingerprint": sample.registry})

    @reads  # decoded on the connection's thread, because an hour of samples takes some milliseconds
    def since(self, connection: Connection, at_ms: int) -> Record:
        rows = connection.execute(SELECT_SAMPLES, (at_ms,)).fetchall()
        return Record(_samples(body for (body,) in rows), _statuses(connection))

    @reads
    def summaries(self, connection: Connection, since_ms: int) -> list[Sample]:
        rows = connection.execute(SELECT_SUMMARIES, {"since": since_ms}).fetchall()
        return sorted(_samples(body for (body,) in rows), key=lambda sample: sample.at_ms)


def _summarise(connection: Connection, now_ms: int) -> None:
    """For each ended period that has no summary, store one per role (api, worker). First delete old summaries, and
    summaries of future times: they were made before the clock was set back, and would prevent new ones."""
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
    """The sum of each count over the samples of the last hour, by the name of the count."""
    rows = connection.execute(SELECT_SAMPLES, (now_ms - HOUR_MS,))
    return sum_samples(_samples(body for (body,) in rows)).counts


def _samples(bodies: Iterable[str]) -> list[Sample]:
    """Decode samples. Skip those that this release cannot decode: another release may write other fields."""
    found = []
    for body in bodies:
        with suppress(msgspec.MsgspecError):
            found.append(_decode(body))
    return found


async def backlog(database: Database, now_ms: int) -> Gauges:
    """Count the pending work and the faults in the database. Raises `StoreUnavailable`."""
    return await database.read(lambda connection: backlog_of(connection, now_ms))


def backlog_of(connection: Connection, now_ms: int) -> Gauges:
    row = connection.execute(SELECT_BACKLOG, (now_ms + AHEAD_MS,)).fetchone()
    outbox, oldest_ms, letters, owed, unreadable, ahead = row
    age_s = 0.0 if oldest_ms is None else max(0, now_ms - oldest_ms) / 1000
    return Gauges(
        outbox=outbox, outbox_age_s=age_s, dead_letters=letters, owed=owed, events_ahead=ahead, unreadable=unreadable
    )


async def unknown_decisions(database: Database, now_ms: int) -> list[tuple[str, int]]:
    """Count the events whose decision id is unknown for their user, by sender. A sender is left out after a day without
    such an event; its count then restarts at 0. Raises `StoreUnavailable`."""
    return await database.rows(SELECT_UNKNOWN, (now_ms - DAY_MS,))
