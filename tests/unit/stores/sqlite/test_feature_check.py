"""The rules for the SQL of a feature."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from app.errors import RegistryError
from app.features.definitions import REGISTRY as OURS
from app.features.events import FEEDBACK, SERVED
from app.features.registry import Registry
from app.stores.sqlite import features
from app.stores.sqlite.features import check_features, compile_registry
from tests.support.entries import entry
from tests.support.logs import Recorder


@pytest.fixture
def migrated(database_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(database_path, isolation_level=None)) as connection:
        yield connection


def refusal(migrated: sqlite3.Connection, compute: str, **changes: object) -> str:
    """The message that refuses an entry with this SQL beside a valid one."""
    registry = Registry([entry(name="sound"), entry(name="broken", compute=compute, **changes)])
    with pytest.raises(RegistryError) as caught:
        check_features(compile_registry(registry), migrated)
    message = str(caught.value)
    assert str(caught.value).startswith("feature 'broken': ")
    assert "'broken'" in message
    return message


def test_registry_of_the_service_is_accepted(migrated: sqlite3.Connection) -> None:
    check_features(compile_registry(OURS), migrated)


def counting(source: str, columns: str = "'u' AS user_id, COUNT(*) AS value") -> str:
    return f"SELECT {columns} FROM {source}"


TABLES = ("tip_views", "tip_feedback", "event_log", "service", "main.views", "alembic_version")
CATALOGUES = ("sqlite_master", "sqlite_schema", "sqlite_temp_master", "sqlite_sequence")
TABLE_FUNCTIONS = ("pragma_table_info('tip_views')", "pragma_table_list", "json_each('[1]')")
PARAMETERS = (":now_ms", ":other", "?", "?1", "$now_ms", "@now_ms", ":asked", ":clock_ms")
CHANGING = (
    "CURRENT_TIMESTAMP",
    "current_date",
    "CURRENT_TIME",
    "date('now')",
    "date('n' || 'ow')",
    "DATE(occurred_at_ms / 1000, 'unixepoch', 'localtime')",
    "julianday()",
    "datetime( )",
    "strftime('%s')",
    "unixepoch(tip_id)",
    "random()",
    "RANDOMBLOB(4)",
    "changes()",
    "total_changes()",
    "last_insert_rowid()",
    "sqlite_version()",
    "load_extension('x')",
)
REFUSED: dict[str, list[str]] = {
    "does not compile": [
        "SELECT user_id, COUNT(* AS value FROM views",
        "SELECT user_id, mood AS value FROM views",
        "SELECT user_id, median(occurred_at_ms) AS value FROM views",
        "SELECT user_id, COUNT(*) AS value FROM views) UNION SELECT (1, 2",
        "SELECT user_id, COUNT(*) AS value FROM views /* and",
        "-- nothing",
        # Columns of the tables that are not columns of the relations.
        "SELECT user_id, received_at_ms AS value FROM views",
        "SELECT user_id, rowid AS value FROM views",
        "SELECT asked.user_id AS user_id, 1 AS value FROM views",
    ],
    "only the relations views and feedback": [counting(table) for table in TABLES],
    "views and feedback": [
        *map(counting, (*CATALOGUES, *TABLE_FUNCTIONS)),
        *(counting(catalogue, "name AS user_id, 1 AS value") for catalogue in CATALOGUES),
    ],
    "one statement": [
        f"{counting('views')}; SELECT 1",
        f"{counting('views')}; DROP TABLE tip_views",
        f"{counting('views', 'user_id, COUNT(*) AS value')};",
    ],
    "one SELECT": [
        *("DELETE FROM views", "DROP TABLE views", "PRAGMA user_version = 5", "ATTACH ':memory:' AS other", "BEGIN")
    ],
    "no parameter, not even :now_ms": [counting("views", f"user_id, {name} AS value") for name in PARAMETERS],
    "may not read the time": [
        f"SELECT user_id, MAX({value}) AS value FROM views GROUP BY user_id" for value in CHANGING
    ],
    "must yield (user_id, value)": [
        counting("views", columns)
        for columns in ("user_id", "user_id, 1 AS value, 2 AS more", "user_id, 1 AS result", "1 AS value, user_id", "*")
    ],
    "reads none of the relations": ["SELECT 'ann' AS user_id, 1 AS value"],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_entry_is_refused_when_its_sql_breaks_a_rule(migrated: sqlite3.Connection, reason: str) -> None:
    for compute in REFUSED[reason]:
        assert reason in refusal(migrated, compute), compute


@pytest.mark.parametrize(
    ("compute", "reads"),
    [
        ("SELECT user_id, COUNT(*) AS value FROM views", ("views",)),
        ("SELECT user_id, COUNT(*) AS value FROM FeedBack GROUP BY user_id", ("feedback",)),
        # Joined by a common column alone, or only counted.
        ("SELECT user_id, COUNT(*) AS value FROM views JOIN feedback USING (user_id)", ("views", "feedback")),
        ("SELECT user_id, COUNT(*) AS value FROM feedback NATURAL JOIN views", ("views", "feedback")),
        ("SELECT user_id, (SELECT COUNT(*) FROM views) AS value FROM feedback", ("views", "feedback")),
        ("SELECT user_id, 1 AS value FROM feedback WHERE EXISTS (SELECT 1 FROM views)", ("views", "feedback")),
        ("SELECT user_id, 1 AS value FROM views UNION ALL SELECT user_id, 2 FROM feedback", ("views", "feedback")),
        # The name of one relation for another one, or in a text.
        ("WITH views AS (SELECT * FROM feedback) SELECT user_id, COUNT(*) AS value FROM views", ("feedback",)),
        ("SELECT user_id, 'FROM feedback' AS value FROM views -- feedback", ("views",)),
        ("SELECT views.user_id, COUNT(*) AS value FROM feedback AS views", ("feedback",)),
        (
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3) "
            "SELECT user_id, (SELECT COUNT(*) FROM n) AS value FROM views",
            ("views",),
        ),
    ],
)
def test_subjects_are_derived_from_the_relations_that_are_read(compute: str, reads: tuple[str, ...]) -> None:
    subjects = {"views": SERVED, "feedback": FEEDBACK}
    (compiled,) = compile_registry(Registry([entry(compute=compute, invalidated_by=())]))
    assert compiled.relations == reads
    assert compiled.invalidated_by == tuple(subjects[name] for name in reads)


@pytest.mark.parametrize(
    ("relation", "lacking", "given"), [("views", SERVED, (FEEDBACK,)), ("feedback", FEEDBACK, (SERVED,))]
)
def test_entry_is_refused_when_it_lacks_the_subject_of_a_relation(
    migrated: sqlite3.Connection, relation: str, lacking: str, given: tuple[str, ...]
) -> None:
    compute = f"SELECT user_id, COUNT(*) AS value FROM {relation} GROUP BY user_id"
    message = refusal(migrated, compute, invalidated_by=given)
    assert f"the SQL reads {relation}, so invalidated_by must name {lacking!r}" in message


def test_superfluous_subject_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(features, "log", recorder)
    (compiled,) = compile_registry(Registry([entry(invalidated_by=(SERVED, FEEDBACK))]))
    assert compiled.invalidated_by == (SERVED, FEEDBACK)
    (line,) = recorder.of("superfluous_subject")
    assert (line["level"], line["feature"], line["subject"]) == ("warning", "probe", FEEDBACK)


ACCEPTED = (
    "SELECT user_id, COUNT(*) AS value FROM views -- how many",
    "SELECT user_id, COUNT(*) AS value FROM views WHERE tip_id <> ':now_ms' GROUP BY user_id",
    'SELECT user_id, COUNT(*) AS "value" FROM views WHERE occurred_at_ms > /* :now_ms */ 5 GROUP BY 1',
    "SELECT user_id, COUNT(*) AS value FROM views WHERE tip_id <> '{0} {name} %s' GROUP BY user_id",
    "WITH recent AS (SELECT * FROM feedback WHERE dwell_ms > 5) "
    "SELECT user_id, COUNT(*) AS value FROM recent GROUP BY user_id",
    "SELECT v.user_id, COUNT(*) AS value FROM views v JOIN feedback f USING (user_id, tip_id) GROUP BY v.user_id",
    "SELECT user_id, MAX((occurred_at_ms / 86400000 + 4) % 7) AS value FROM views GROUP BY user_id",
    "SELECT user_id, SUM(action = 'random') AS value FROM feedback GROUP BY user_id",
    "SELECT user_id, COUNT(*) AS value FROM (SELECT * FROM views UNION ALL SELECT * FROM views) GROUP BY user_id",
)


def test_entry_is_accepted_when_its_sql_keeps_the_rules(migrated: sqlite3.Connection) -> None:
    for compute in ACCEPTED:
        check_features(compile_registry(Registry([entry(compute=compute)])), migrated)
