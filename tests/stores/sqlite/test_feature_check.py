"""What start-up refuses of an entry's SQL: one test for each rule, and the SQL that it must let pass."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from app.errors import RegistryError
from app.features.registry import Registry
from app.stores.sqlite.feature_check import check_features
from tests.support.entries import entry
from tests.support.registry import REGISTRY


@pytest.fixture
def migrated(database_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(database_path, isolation_level=None)) as connection:
        yield connection


def refusal(migrated: sqlite3.Connection, compute: str) -> str:
    """The message with which an entry of this SQL is refused, sound entries beside it."""
    registry = Registry([entry(name="sound"), entry(name="broken", compute=compute)])
    with pytest.raises(RegistryError) as caught:
        check_features(registry, migrated)
    message = str(caught.value)
    assert caught.value.entry == "broken"
    assert "'broken'" in message
    return message


def test_registry_of_the_service_is_accepted(migrated: sqlite3.Connection) -> None:
    check_features(REGISTRY, migrated)


@pytest.mark.parametrize(
    "compute",
    [
        "SELECT user_id, COUNT(* AS value FROM views",
        "SELECT user_id, mood AS value FROM views",
        "SELECT user_id, median(occurred_at_ms) AS value FROM views",
        "SELECT user_id, COUNT(*) AS value FROM views) UNION SELECT (1, 2",
        "SELECT user_id, COUNT(*) AS value FROM views /* and",
        # Columns that exist, but are none of an author's business: the bounds are set already.
        "SELECT user_id, received_at_ms AS value FROM views",
        "SELECT user_id, rowid AS value FROM views",
        "SELECT asked.user_id AS user_id, 1 AS value FROM views",
    ],
)
def test_entry_is_refused_when_its_sql_does_not_compile(migrated: sqlite3.Connection, compute: str) -> None:
    assert "does not compile" in refusal(migrated, compute)


@pytest.mark.parametrize(
    "table", ["tip_views", "tip_feedback", "event_log", "service", "main.views", "alembic_version"]
)
def test_entry_is_refused_when_it_reads_a_table_directly(migrated: sqlite3.Connection, table: str) -> None:
    message = refusal(migrated, f"SELECT 'u' AS user_id, COUNT(*) AS value FROM {table}")
    assert "only the relations views and feedback" in message


@pytest.mark.parametrize("catalogue", ["sqlite_master", "sqlite_schema", "sqlite_temp_master", "sqlite_sequence"])
@pytest.mark.parametrize("columns", ["'u' AS user_id, COUNT(*) AS value", "name AS user_id, 1 AS value"])
def test_entry_is_refused_when_it_reads_a_catalogue(migrated: sqlite3.Connection, catalogue: str, columns: str) -> None:
    assert "views and feedback" in refusal(migrated, f"SELECT {columns} FROM {catalogue}")


@pytest.mark.parametrize("source", ["pragma_table_info('tip_views')", "pragma_table_list", "json_each('[1]')"])
def test_entry_is_refused_when_it_reads_a_table_valued_function(migrated: sqlite3.Connection, source: str) -> None:
    assert "views and feedback" in refusal(migrated, f"SELECT 'u' AS user_id, COUNT(*) AS value FROM {source}")


@pytest.mark.parametrize(
    "compute",
    [
        "SELECT user_id, COUNT(*) AS value FROM views; SELECT 1",
        "SELECT user_id, COUNT(*) AS value FROM views; DROP TABLE tip_views",
        "SELECT user_id, COUNT(*) AS value FROM views;",
    ],
)
def test_entry_is_refused_when_it_holds_a_second_statement(migrated: sqlite3.Connection, compute: str) -> None:
    assert "one statement" in refusal(migrated, compute)


@pytest.mark.parametrize(
    "compute",
    ["DELETE FROM views", "DROP TABLE views", "PRAGMA user_version = 5", "ATTACH ':memory:' AS other", "BEGIN"],
)
def test_entry_is_refused_when_it_is_no_select(migrated: sqlite3.Connection, compute: str) -> None:
    assert "one SELECT" in refusal(migrated, compute)


@pytest.mark.parametrize("parameter", [":other", "?", "?1", "$now_ms", "@now_ms", ":NOW_MS", ":now_ms2", ":asked"])
def test_entry_is_refused_when_it_uses_another_parameter(migrated: sqlite3.Connection, parameter: str) -> None:
    message = refusal(migrated, f"SELECT user_id, {parameter} AS value FROM views")
    assert "no parameter but :now_ms" in message


@pytest.mark.parametrize(
    "clock",
    [
        "CURRENT_TIMESTAMP",
        "current_date",
        "CURRENT_TIME",
        "date('now')",
        "date('NOW', '-1 day')",
        'unixepoch("now")',
        "julianday()",
        "datetime( )",
        "strftime('%s')",
        "strftime('%H', occurred_at_ms / 1000, 'unixepoch', 'localtime')",
        "random()",
        "RANDOMBLOB(4)",
        "total_changes()",
        "last_insert_rowid()",
        "load_extension('x')",
    ],
)
def test_entry_is_refused_when_its_value_hangs_on_more_than_its_facts(migrated: sqlite3.Connection, clock: str) -> None:
    assert ":now_ms" in refusal(migrated, f"SELECT user_id, MAX({clock}) AS value FROM views GROUP BY user_id")


@pytest.mark.parametrize(
    "columns", ["user_id", "user_id, 1 AS value, 2 AS more", "user_id, 1 AS result", "1 AS value, user_id", "*"]
)
def test_entry_is_refused_when_its_columns_are_others(migrated: sqlite3.Connection, columns: str) -> None:
    assert "must yield (user_id, value)" in refusal(migrated, f"SELECT {columns} FROM views")


@pytest.mark.parametrize("compute", ["", "   ", "-- nothing"])
def test_entry_is_refused_when_its_sql_is_empty(migrated: sqlite3.Connection, compute: str) -> None:
    assert "must yield (user_id, value)" in refusal(migrated, compute)


@pytest.mark.parametrize(
    "compute",
    [
        "SELECT user_id, COUNT(*) AS value FROM views -- how many",
        "SELECT user_id, COUNT(*) AS value FROM views WHERE tip_id <> ':now_ms' GROUP BY user_id",
        'SELECT user_id, COUNT(*) AS "value" FROM views WHERE occurred_at_ms <= /* :now_ms */ :now_ms GROUP BY 1',
        "SELECT user_id, COUNT(*) AS value FROM views WHERE tip_id <> '{0} {name} %s' GROUP BY user_id",
        "WITH recent AS (SELECT * FROM feedback WHERE occurred_at_ms > :now_ms - 5) "
        "SELECT user_id, COUNT(*) AS value FROM recent GROUP BY user_id",
        "SELECT v.user_id, COUNT(*) AS value FROM views v JOIN feedback f USING (user_id, tip_id) GROUP BY v.user_id",
        "SELECT user_id, MAX(strftime('%w', occurred_at_ms / 1000, 'unixepoch')) AS value FROM views GROUP BY user_id",
        "SELECT user_id, SUM(action = 'random') AS value FROM feedback GROUP BY user_id",
        "SELECT user_id, COUNT(*) AS value FROM (SELECT * FROM views UNION ALL SELECT * FROM views) GROUP BY user_id",
    ],
)
def test_entry_is_accepted_when_it_keeps_the_rules(migrated: sqlite3.Connection, compute: str) -> None:
    check_features(Registry([entry(compute=compute)]), migrated)
