"""Builds the SQL that computes features for one user or many: statements for now, and for any past moment.

Each feature becomes a scalar subquery, correlated with the requested row. In the subquery, `views` and `feedback` are
common table expressions that contain only events of the row's user within the feature's window. They are NOT
MATERIALIZED, so that the engine searches the covering index by user and time. The SQL of a feature has no time bounds,
so one statement serves many moments. A feature is computed only if its bit is set in the row's mask.

The statement for now has no upper bound for event times, so that an accepted event counts at once, even if the clock of
this process is behind. The lower bound depends on the clock and on no event, so that an event of one user does not move
the window of another user. The statements select the user's version by a seek in an index; the statement for now
selects the oldest event in each window in the same way.
"""

from __future__ import annotations

from typing import NamedTuple

from app.features.events import RELATIONS
from app.features.registry import Registry

TABLES = {"views": "tip_views", "feedback": "tip_feedback"}
LOCAL_HOUR = "((occurred_at_ms + utc_offset_min * 60000) / 3600000) % 24 AS local_hour"
_FEATURE = """
    CASE WHEN asked.mask & {bit} <> 0 THEN (
        WITH views AS NOT MATERIALIZED (
        SELECT user_id, tip_id, occurred_at_ms, {local_hour}, decision_id FROM tip_views
        {narrowed}),
        feedback AS NOT MATERIALIZED (
        SELECT user_id, tip_id, occurred_at_ms, {local_hour}, action, dwell_ms, decision_id FROM tip_feedback
        {narrowed})
        SELECT {value} FROM (
{compute}
        ) AS computed
    ) END AS "{name}\""""
_LIVE_ROWS = "item.key AS place, item.value ->> 0 AS user_id, CAST(item.value ->> 1 AS BIGINT) AS mask"
_LIVE_BOUNDS = "WHERE user_id = asked.user_id AND occurred_at_ms > :clock_ms - {window_ms}"
_PAST_ROWS = (
    _LIVE_ROWS
    + """, CAST(item.value ->> 2 AS BIGINT) AS now_ms,
           COALESCE(CAST(item.value ->> 3 AS BIGINT), 9223372036854775807) AS known_ms"""
)
_PAST_BOUNDS = """WHERE user_id = asked.user_id
          AND occurred_at_ms > asked.now_ms - {window_ms} AND occurred_at_ms <= asked.now_ms
          AND received_at_ms <= asked.known_ms"""
_REPEATED_ROWS = (
    _PAST_ROWS
    + """,
           CASE WHEN item.value ->> 4 IS NULL THEN CAST(item.value ->> 2 AS BIGINT) ELSE 9223372036854775807 END
               AS until_ms,
           COALESCE(CAST(item.value ->> 4 AS BIGINT), 9223372036854775807) AS version"""
)
_REPEATED_BOUNDS = """WHERE user_id = asked.user_id
          AND occurred_at_ms > asked.now_ms - {window_ms} AND occurred_at_ms <= asked.until_ms
          AND received_at_ms <= asked.known_ms AND seq <= asked.version"""
_OLDEST = "(SELECT MIN(occurred_at_ms) FROM {table} {bounds})"
_STATEMENT = """
WITH asked AS MATERIALIZED (
    SELECT {rows}
    FROM {items}
)
SELECT {columns}
FROM asked
ORDER BY asked.place
"""


class Dialect(NamedTuple):
    """The parts of the SQL that differ between the engines. `items` turns `:asked`, a JSON array, into rows with the
    columns `key` and `value`. `value` selects the value from the rows of a feature's SQL. `version` selects the user's
    version: the sequence number of the user's newest event. Without events, it is minus the number of erasures so far,
    so it is lower than the number of any event, and different after each erasure."""

    items: str
    value: str
    version: str


class Statements(NamedTuple):
    """The SQL that computes the features of a registry for the rows in `:asked`, a JSON array of `ComputeRow`.

    `live` computes values as of now, the parameter `:clock_ms`. `past` computes each row as of its own `now_ms`. So
    does `repeated`, from the events up to the row's `version` if it has one. The result has the order of `:asked`. Its
    columns are the user's version (0 for `past`), then, only for `live`, the time of the oldest event in each of
    `windows` (relation, milliseconds), then the value of each feature. `one` is `live` for one user, with `:user_id`
    and `:mask` instead of `:asked`. It has no join, so that a distributed engine sends it to the node of the user."""

    live: str
    one: str
    past: str
    repeated: str
    windows: tuple[tuple[str, int], ...]


def build(registry: Registry, dialect: Dialect) -> Statements:
    windows = tuple(
        dict.fromkeys((relation, entry.window_ms) for entry in registry for relation in entry.relations or RELATIONS)
    )
    oldest = [
        _OLDEST.format(table=TABLES[relation], bounds=_LIVE_BOUNDS.format(window_ms=window_ms))
        for relation, window_ms in windows
    ]

    def columns(first: list[str], bounds: str, *, parameters: bool = False) -> str:
        """The select list: `first`, and the value of each feature over the events within `bounds`. If `parameters` is
        True, the columns of the table `asked` become parameters: for example, `asked.user_id` becomes `:user_id`."""

        def form(text: str) -> str:
            return text.replace("asked.", ":") if parameters else text

        features = [
            form(_FEATURE).format(
                bit=1 << index,
                name=entry.name,
                local_hour=LOCAL_HOUR,
                narrowed=form(bounds).format(window_ms=entry.window_ms),
                value=dialect.value,
                compute=entry.compute,
            )
            for index, entry in enumerate(registry)
        ]
        return ", ".join([*map(form, first), *features])

    def statement(rows: str, selected: str) -> str:
        return _STATEMENT.format(rows=rows, items=dialect.items, columns=selected)

    return Statements(
        statement(_LIVE_ROWS, columns([dialect.version, *oldest], _LIVE_BOUNDS)),
        "SELECT " + columns([dialect.version, *oldest], _LIVE_BOUNDS, parameters=True),
        statement(_PAST_ROWS, columns(["0"], _PAST_BOUNDS)),
        statement(_REPEATED_ROWS, columns([dialect.version], _REPEATED_BOUNDS)),
        windows,
    )
