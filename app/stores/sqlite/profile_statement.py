"""Builds the SQL that computes features for one user or many: a statement for now, and one for any past moment.

Each feature becomes a scalar subquery, correlated with the requested row. In the subquery, `views` and `feedback` are
common table expressions that contain only events of the row's user within the feature's window. They are NOT
MATERIALIZED, so that SQLite searches the covering index by user and time. The SQL of a feature has no time bounds, so
one statement serves many moments. A feature is computed only if its bit is set in the row's mask.

The statement for now bounds event times only from below. So an accepted event counts at once, even if the clock of this
process is behind, and an event of one user does not move the window of another user. Both statements select the user's
version by a seek in an index; the statement for now selects the oldest event in each window in the same way.
"""

from __future__ import annotations

from typing import NamedTuple

from app.features.events import KNOWN_SUBJECTS, RELATIONS
from app.features.registry import Registry

TABLES = {"views": "tip_views", "feedback": "tip_feedback"}
_LOCAL_HOUR = "((occurred_at_ms + utc_offset_min * 60000) / 3600000) % 24 AS local_hour"
_FEATURE = """
    CASE WHEN asked.mask & {bit} THEN (
        WITH views AS NOT MATERIALIZED (
        SELECT user_id, tip_id, occurred_at_ms, {local_hour}, decision_id FROM tip_views
        {narrowed}),
        feedback AS NOT MATERIALIZED (
        SELECT user_id, tip_id, occurred_at_ms, {local_hour}, action, dwell_ms, decision_id FROM tip_feedback
        {narrowed})
        SELECT CASE COUNT(*) WHEN 1 THEN MAX(value) WHEN 0 THEN NULL ELSE x'' END FROM (
{compute}
        )
    ) END AS "{name}\""""
_LIVE_ROWS = """SELECT item.key AS place, item.value ->> 0 AS user_id, item.value ->> 1 AS mask
    FROM json_each(:asked) AS item"""
_LIVE_BOUNDS = "WHERE user_id = asked.user_id AND occurred_at_ms > :clock_ms - {window_ms}"
_PAST_ROWS = """SELECT item.key AS place, item.value ->> 0 AS user_id, item.value ->> 1 AS mask,
           item.value ->> 2 AS now_ms, COALESCE(item.value ->> 3, 9223372036854775807) AS known_ms
    FROM json_each(:asked) AS item"""
_PAST_BOUNDS = """WHERE user_id = asked.user_id
          AND occurred_at_ms > asked.now_ms - {window_ms} AND occurred_at_ms <= asked.now_ms
          AND received_at_ms <= asked.known_ms"""
_REPEATED_ROWS = """SELECT item.key AS place, item.value ->> 0 AS user_id, item.value ->> 1 AS mask,
           item.value ->> 2 AS now_ms,
           iif(item.value ->> 4 IS NULL, item.value ->> 2, 9223372036854775807) AS until_ms,
           COALESCE(item.value ->> 3, 9223372036854775807) AS known_ms,
           COALESCE(item.value ->> 4, 9223372036854775807) AS version
    FROM json_each(:asked) AS item"""
_REPEATED_BOUNDS = """WHERE user_id = asked.user_id
          AND occurred_at_ms > asked.now_ms - {window_ms} AND occurred_at_ms <= asked.until_ms
          AND received_at_ms <= asked.known_ms AND seq <= asked.version"""
# Without an event, it is the number of erasures, negative: lower than any event's, and another after each erasure.
_VERSION = "MAX({of_subjects}) AS version".format(
    of_subjects=", ".join(
        f"""COALESCE((SELECT MAX(seq) FROM event_log WHERE user_id = asked.user_id AND subject = '{subject}'),
            -(SELECT erasures FROM bandit_ledger))"""
        for subject in sorted(KNOWN_SUBJECTS)
    )
)
_OLDEST = "(SELECT MIN(occurred_at_ms) FROM {table} {bounds})"
_STATEMENT = """
WITH asked AS MATERIALIZED (
    {rows}
)
SELECT {columns}
FROM asked
ORDER BY asked.place
"""


class Statements(NamedTuple):
    """The SQL that computes the features of a registry.

    `live` computes rows as of now, `past` rows of past moments, and `repeated` rows of past moments of which any has a
    version. Parameters: `:clock_ms` for `live`, and `:asked`, a JSON array of `ComputeRow`. The rows of the result are
    in the order of `:asked`. Their columns are the user's version (0 for `past`), for `live` the event time of the
    oldest event in each of `windows`, and one value per feature. If a feature's SQL returns several rows for a user,
    the value is an empty blob, which is invalid for every dtype.

    `windows` are the pairs of a relation and a window in milliseconds that the features have.
    """

    live: str
    past: str
    repeated: str
    windows: tuple[tuple[str, int], ...]


def build(registry: Registry) -> Statements:
    windows = tuple(
        dict.fromkeys((relation, entry.window_ms) for entry in registry for relation in entry.relations or RELATIONS)
    )
    oldest = [
        _OLDEST.format(table=TABLES[relation], bounds=_LIVE_BOUNDS.format(window_ms=window_ms))
        for relation, window_ms in windows
    ]
    return Statements(
        _STATEMENT.format(rows=_LIVE_ROWS, columns=", ".join([_VERSION, *oldest, *_features(registry, _LIVE_BOUNDS)])),
        _STATEMENT.format(rows=_PAST_ROWS, columns=", ".join(["0", *_features(registry, _PAST_BOUNDS)])),
        _STATEMENT.format(rows=_REPEATED_ROWS, columns=", ".join([_VERSION, *_features(registry, _REPEATED_BOUNDS)])),
        windows,
    )


def _features(registry: Registry, bounds: str) -> list[str]:
    return [
        _FEATURE.format(
            bit=1 << index,
            name=entry.name,
            local_hour=_LOCAL_HOUR,
            narrowed=bounds.format(window_ms=entry.window_ms),
            compute=entry.compute,
        )
        for index, entry in enumerate(registry)
    ]
