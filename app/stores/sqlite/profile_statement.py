"""The one statement that computes features, for one user or many, now or at any past moment.

Each feature becomes a scalar subquery, correlated with the row asked for. In it `views` and `feedback` are common
table expressions already narrowed to that row's user, to event times after `now - window`, and to what had arrived by
the row's `known_ms`. They are NOT MATERIALIZED, so that the bounds reach the covering index. An author's text has no
time bounds of its own, which is how one statement serves many moments. A feature is computed only if the row's mask has
its bit.

Only a past moment bounds event times from above. A live read has no such bound: an accepted event counts at once,
whichever process's clock is behind, and no event of one user moves the window of another.
"""

from __future__ import annotations

from app.features.registry import Feature, Registry

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
    """The statement. Parameters: `:clock_ms`, and `:asked`, a JSON array of [user, mask, now_ms, known_ms].

    Rows come in the order asked: the newest sequence number, then one value per feature. A feature whose SQL gave
    more than one row for a user shows as an empty blob, which is no value of any dtype.
    """
    return _STATEMENT.format(columns=",".join(_column(1 << index, entry) for index, entry in enumerate(registry)))


def _column(bit: int, entry: Feature) -> str:
    return _FEATURE.format(
        bit=bit,
        name=entry.name,
        window_ms=entry.window_ms,
        compute=entry.compute,
    )
