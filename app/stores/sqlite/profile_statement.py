"""Builds the SQL statement that computes features, for one user or many, now or at any past moment.

Each feature becomes a scalar subquery, correlated with the requested row. In it, `views` and `feedback` are common
table expressions. They contain only events of that row's user that occurred after `now - window` and arrived by the
row's `known_ms`. They are NOT MATERIALIZED, so that these bounds reach the covering index. The SQL of a feature has no
time bounds, so one statement serves many moments. A feature is computed only if its bit is set in the row's mask.

Only a past moment bounds event times from above. A live read has no upper bound: an accepted event counts at once, even
if the clock of this process is behind, and no event of one user moves the window of another.
"""

from __future__ import annotations

from app.features.registry import Registry

_NARROWED = """
        WHERE user_id = asked.user_id
          AND occurred_at_ms > asked.now_ms - {window_ms} AND occurred_at_ms <= asked.until_ms
          AND received_at_ms <= asked.known_ms"""

_LOCAL_HOUR = "((occurred_at_ms + utc_offset_min * 60000) / 3600000) % 24 AS local_hour"

_FEATURE = (
    """
    CASE WHEN asked.mask & {bit} THEN (
        WITH views AS NOT MATERIALIZED (
        SELECT user_id, tip_id, occurred_at_ms, """
    + _LOCAL_HOUR
    + """, decision_id FROM tip_views"""
    + _NARROWED
    + """),
        feedback AS NOT MATERIALIZED (
        SELECT user_id, tip_id, occurred_at_ms, """
    + _LOCAL_HOUR
    + """, action, dwell_ms, decision_id FROM tip_feedback"""
    + _NARROWED
    + """)
        SELECT CASE COUNT(*) WHEN 1 THEN MAX(value) WHEN 0 THEN NULL ELSE x'' END FROM (
{compute}
        )
    ) END AS "{name}\""""
)

_STATEMENT = """
WITH newest AS MATERIALIZED (
    SELECT COALESCE((SELECT seq FROM sqlite_sequence WHERE name = 'event_log'), 0) AS seq
),
asked AS MATERIALIZED (
    SELECT item.key AS place, item.value ->> 0 AS user_id, item.value ->> 1 AS mask,
           COALESCE(item.value ->> 2, :clock_ms) AS now_ms,
           COALESCE(item.value ->> 2, 9223372036854775807) AS until_ms,
           COALESCE(item.value ->> 3, 9223372036854775807) AS known_ms,
           newest.seq AS seq
    FROM json_each(:asked) AS item, newest
)
SELECT asked.seq, {columns}
FROM asked
ORDER BY asked.place
"""


def build(registry: Registry) -> str:
    """The SQL that computes the features of a registry.

    Parameters: `:clock_ms`, and `:asked`, a JSON array of [user, mask, now_ms, known_ms]. The rows of the result are in
    the order of `:asked`: the newest sequence number, then one value per feature. If a feature's SQL returns several
    rows for a user, the value is an empty blob, which is invalid for every dtype.
    """
    columns = (
        _FEATURE.format(bit=1 << index, name=entry.name, window_ms=entry.window_ms, compute=entry.compute)
        for index, entry in enumerate(registry)
    )
    return _STATEMENT.format(columns=",".join(columns))
