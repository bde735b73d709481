"""No feature reads an event table but by its covering index."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from app.features.registry import Registry
from app.stores.sqlite.event_log import (
    SELECT_LOGGED,
    SELECT_PRUNABLE,
    SELECT_UNCONSUMED,
    SELECT_UNCONSUMED_AHEAD,
)
from app.stores.sqlite.profile_statement import build
from app.stores.sqlite.users import SELECT_BY_PREFIX, SELECT_NEWEST
from tests.support.entries import entry
from tests.support.registry import REGISTRY

EVENT_TABLES = re.compile(r"\b(tip_views|tip_feedback|event_log)\b")
BOUNDED = "USING COVERING INDEX {table}_covering (user_id=? AND occurred_at_ms>? AND occurred_at_ms<?)"
UNBOUNDED = Registry(
    [
        entry(name="views_ever", compute="SELECT user_id, COUNT(*) AS value FROM views GROUP BY user_id"),
        entry(name="actions_ever", compute="SELECT user_id, COUNT(DISTINCT action) AS value FROM feedback"),
        entry(
            name="newest_hour",
            compute="SELECT user_id, local_hour AS value FROM feedback ORDER BY occurred_at_ms DESC LIMIT 1",
        ),
    ]
)


def plan(path: Path, sql: str, parameters: object) -> list[str]:
    """The lines of a query plan."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("EXPLAIN QUERY PLAN " + sql, parameters).fetchall()  # type: ignore[arg-type]  # either style
    return [str(row[-1]) for row in rows]


@pytest.mark.parametrize("registry", [REGISTRY, UNBOUNDED], ids=["service", "author forgot the bound"])
def test_profile_statement_searches_covering_indexes_when_it_reads_facts(
    database_path: Path, registry: Registry
) -> None:
    asked = json.dumps([["ann", registry.full_mask, None, None]])
    lines = [
        line
        for line in plan(database_path, build(registry), {"clock_ms": 0, "asked": asked})
        if EVENT_TABLES.search(line)
    ]
    assert len(lines) == len(registry)  # one relation a feature
    assert not [line for line in lines if "SCAN" in line]
    for line in lines:
        assert line.endswith(BOUNDED.format(table=EVENT_TABLES.findall(line)[0]))


@pytest.mark.parametrize(
    ("sql", "parameters"),
    [
        (SELECT_UNCONSUMED, (0, 1)),
        (SELECT_UNCONSUMED_AHEAD, (0, 1)),
        (SELECT_LOGGED, ("[1]",)),
        (SELECT_PRUNABLE, (0, 1)),
        (SELECT_NEWEST, ("[]", "[]")),
    ],
    ids=["unconsumed", "unconsumed ahead", "logged", "prunable", "newest"],
)
def test_log_is_searched_by_an_index_when_workers_read_it(
    database_path: Path, sql: str, parameters: tuple[object, ...]
) -> None:
    lines = plan(database_path, sql, parameters)
    assert [line for line in lines if re.match(r"SEARCH (log|event_log)\b", line)]
    assert not [line for line in lines if line.startswith("SCAN") and "VIRTUAL TABLE" not in line]


def test_users_are_found_by_seeking_in_an_index(database_path: Path) -> None:
    lines = plan(database_path, SELECT_BY_PREFIX, {"prefix": "a", "limit": 20})
    searches = [line for line in lines if "event_log" in line]
    assert searches == ["SEARCH event_log USING COVERING INDEX event_log_by_user (user_id>?)"] * 2
    assert not [line for line in lines if line.startswith("SCAN") and line != "SCAN found"]
