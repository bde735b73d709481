"""Diagnoses the contents of a database for `profiles doctor`, whichever engine it is. It changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Literal

from app.events.retention import next_cutoff
from app.features.clock import DAY_MS
from app.operations.doctor import Line, diagnose_features
from app.operations.findings import AUDIT_COUNTS, RULES, Finding, waiting_to_be_pruned, wrong_decisions
from app.operations.samples import Sample
from app.profiles.availability import Disabled
from app.stores.sql.database import Connection
from app.stores.sql.event_log import SELECT_OLDEST as SELECT_OLDEST_EVENT
from app.stores.sql.retention import SELECT_CUTOFF
from app.stores.sql.retention import SELECT_OLDEST as SELECT_OLDEST_DECISION
from app.stores.sql.samples import SELECT_UNKNOWN, backlog_of, hour_counts, running

SELECT_DISABLED = "SELECT feature, disabled_by, reason, disabled_at_ms FROM disabled_features ORDER BY feature"
SELECT_OLDEST = {"events": SELECT_OLDEST_EVENT, "decisions": SELECT_OLDEST_DECISION}
OUTBOX_OLD_S = 60.0
SAMPLE_OLD_S = 60.0


def diagnose_contents(
    connection: Connection, now_ms: int, days: Mapping[str, int], *, whole: bool
) -> tuple[list[Line], list[Sample]]:
    """Return the lines of the report, and the newest metric sample of each running process. `days`: the retention of
    `events` and of `decisions`, in days. `whole`: also decode the statistics of every user, to find new damage."""

    def first(statement: str, *parameters: object) -> int | None:
        row = connection.execute(statement, parameters).fetchone()
        return None if row is None or row[0] is None else int(row[0])

    samples = running(connection, now_ms)
    work = backlog_of(connection, now_ms)
    disabled = [Disabled(*row) for row in connection.execute(SELECT_DISABLED)]
    unknown = connection.execute(SELECT_UNKNOWN, (now_ms - DAY_MS,)).fetchall()
    waiting = [
        what
        for what, kept in days.items()
        if next_cutoff(now_ms - kept * DAY_MS, first(SELECT_CUTOFF, what), first(SELECT_OLDEST[what])) is None
    ]
    owed = "Start the cache again. Until a process has made them, reads of these users are computed."
    ahead = "events more than five minutes in the future"
    deleted = "events and decisions past their retention are deleted every night"
    lines = [
        _outbox(work.outbox or 0, work.outbox_age_s or 0.0),
        _count("invalidations", work.owed, "invalidations owed to the cache", owed),
        _count("event times", work.events_ahead, ahead, RULES["events_ahead"].advice),
        _found("decision ids", wrong_decisions(unknown), "every decision id that was sent in the last day is known"),
        _count("dead letters", work.dead_letters, "dead letters", "Replay or discard each: /admin/dead-letters."),
        *_scoring(connection, whole=whole),
        _samples(first("SELECT MAX(at_ms) FROM samples"), now_ms),
        _audit(hour_counts(connection, now_ms)),
        diagnose_features(samples, {row.feature: str(row) for row in disabled}),
        _found("retention", waiting_to_be_pruned(waiting), deleted),
    ]
    return lines, samples


def _scoring(connection: Connection, *, whole: bool) -> list[Line]:
    if find_spec("numpy") is None:
        return []
    from app.stores.sql.sufficient_statistics import damaged, priors  # noqa: PLC0415

    users = damaged(connection, whole=whole)
    aside = "They are scored as new users. Restore their rows of bandit_states from a backup, or erase the users."
    none = "Check the disk. Until a new one is pooled, after the next learning, decisions use an older prior or none."
    return [
        _count("evidence", users, "users whose sufficient statistics are damaged", aside, "bad"),
        _count("priors", sum(prior is None for prior in priors(connection)), "damaged pooled priors", none, "bad"),
    ]


def _count(check: str, count: int | None, faults: str, remedy: str, state: Literal["warn", "bad"] = "warn") -> Line:
    return Line(check, state, f"{faults}: {count:,}", remedy) if count else Line(check, "ok", f"{faults}: none")


def _outbox(count: int, age_s: float) -> Line:
    if age_s < OUTBOX_OLD_S:
        return Line("outbox", "ok", f"{count:,} events wait for a worker")
    text = f"{count:,} events wait for a worker, the oldest for {age_s:,.0f} s"
    return Line("outbox", "warn", text, "Start `profiles worker`, or one more.")


def _found(check: str, found: Sequence[Finding], otherwise: str) -> Line:
    if not found:
        return Line(check, "ok", otherwise)
    return Line(check, "warn", " ".join(finding.text for finding in found), found[0].advice)


def _samples(newest_ms: int | None, now_ms: int) -> Line:
    age_s = None if newest_ms is None else (now_ms - newest_ms) / 1000
    if age_s is not None and age_s <= SAMPLE_OLD_S:
        return Line("samples", "ok", f"a process stored a sample of its metrics {max(0.0, age_s):,.0f} s ago")
    text = "no process has ever stored a sample" if age_s is None else f"the newest sample is {age_s:,.0f} s old"
    remedy = "Start `profiles serve` and `profiles worker`, or find in their logs why they cannot write."
    return Line("samples", "warn", text, remedy)


def _audit(counts: Mapping[str, int]) -> Line:
    found = [(RULES[name], counts[name]) for name in AUDIT_COUNTS if counts.get(name)]
    if not found:
        return Line("audit", "ok", "the workers' audit has found no wrong value in the last hour")
    text = " ".join(rule.text(count) for rule, count in found)
    return Line("audit", "bad", text, " ".join(rule.advice for rule, _ in found))
