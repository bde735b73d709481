"""Migrations of PostgreSQL: its schema means the same as that of SQLite."""

import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic import command
from sqlalchemy import URL, Engine, create_engine, inspect
from sqlalchemy.pool import NullPool

from app.errors import SchemaMismatch, StoreUnavailable
from app.migrations import configuration
from app.settings.parsers import PostgresUrl
from app.settings.parsers import postgres_url as parsed
from app.stores.migrate import current, migrate
from app.stores.sql.database import SCHEMA_REVISION
from tests.support.postgres import binaries, drop_tables
from tests.support.processes import ROOT, environment_of
from tests.support.waiting import PATIENCE_S

KINDS = {"BIGINT": "INTEGER", "BYTEA": "BLOB", "DOUBLE PRECISION": "REAL", 'TEXT COLLATE "C"': "TEXT"}
# Their columns begin the primary key there.
BY_PRIMARY_KEY = {("tip_scores_by_user", "")}
SELECT_UNIQUE = """
SELECT indrelid::regclass::text, ARRAY(
    SELECT attname::text FROM pg_attribute WHERE attrelid = indrelid AND attnum = ANY (indkey)
) FROM pg_index JOIN pg_class ON pg_class.oid = indrelid
WHERE indisunique AND relnamespace = 'public'::regnamespace
"""
EXPRESSION = "quality_reports_active"  # SQLAlchemy does not read it on SQLite
ONLY_ON_POSTGRES = {"users"}
KEYED_BY_USER = {
    "event_log",
    "outbox",
    "tip_views",
    "tip_feedback",
    "bandit_states",
    "tip_scores",
    "decision_events",
    "users",
}

Schema = dict[str, dict[str, Any]]


def plain(expression: str) -> str:
    """A CHECK or WHERE expression without what an engine adds or removes when it stores it."""
    text = re.sub(r"::(double precision|\w+)(\[\])?|[\"()\[\]]|\bARRAY\b", "", expression)
    text = re.sub(r"(\w+) >= (\d+) AND \1 <= (\d+)", r"\1 BETWEEN \2 AND \3", text.replace("= ANY ", "IN "))
    return re.sub(r"\s+", " ", text).strip()


def condition(index: Any) -> str:
    """The WHERE of a partial index."""
    options = index.get("dialect_options", {})
    return plain(str(options.get("postgresql_where", options.get("sqlite_where", ""))))


def engine_of(database: Path | PostgresUrl) -> Engine:
    if isinstance(database, Path):
        return create_engine(URL.create("sqlite", database=str(database)), poolclass=NullPool)
    return create_engine("postgresql+psycopg://", creator=partial(psycopg.connect, database.url), poolclass=NullPool)


def schema(database: Path | PostgresUrl) -> Schema:
    """What the tables of a database mean, in words that both engines share. Unique keys are without the user id."""
    inspector = inspect(engine_of(database))
    warnings.filterwarnings("ignore", f".*expression-based index {EXPRESSION}")
    kinds = KINDS if isinstance(database, PostgresUrl) else {kind: kind for kind in KINDS.values()}
    kinds = {**kinds, "VARCHAR(32)": "VARCHAR(32)"}  # Alembic's
    tables: Schema = {}
    for name in inspector.get_table_names():
        indexes = [index for index in inspector.get_indexes(name) if index["name"] != EXPRESSION]
        primary = tuple(inspector.get_pk_constraint(name)["constrained_columns"])
        keys: list[tuple[tuple[str | None, ...], str]] = [(primary, "")]
        keys += [(tuple(key["column_names"]), "") for key in inspector.get_unique_constraints(name)]
        keys += [(tuple(index["column_names"]), condition(index)) for index in indexes if index["unique"]]
        tables[name] = {
            "columns": {
                column["name"]: (kinds[str(column["type"])], column["nullable"] and column["name"] not in primary)
                for column in inspector.get_columns(name)
            },
            "unique": {(frozenset(set(key) - {"user_id"} or key), where) for key, where in keys},
            "checks": {plain(str(check["sqltext"])) for check in inspector.get_check_constraints(name)},
            "indexes": {(str(index["name"]), condition(index)) for index in indexes},
        }
    return tables


def dump(database: PostgresUrl) -> str:
    """The definition of a database, without comments."""
    command = [str(binaries() / "pg_dump"), "--schema-only", "-d", database.url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.sub(r"^(--|\\).*\n", "", text, flags=re.MULTILINE)


def migrate_alone(database: PostgresUrl) -> int:
    """Migrate in a process of its own; its exit code."""
    return subprocess.run(
        [sys.executable, "-m", "app", "migrate"], cwd=ROOT, env=environment_of(database=database.url), check=False
    ).returncode


def test_both_engines_have_the_same_schema(postgres_url: PostgresUrl, database_path: Path) -> None:
    there, here = schema(postgres_url), schema(database_path)
    assert set(there) == set(here) | ONLY_ON_POSTGRES
    for name, table in here.items():
        for part in ("columns", "unique", "checks"):
            assert there[name][part] == table[part], f"{part} of {name}"


def storage_options(database: PostgresUrl) -> dict[str, list[str]]:
    with psycopg.connect(database.url) as connection:
        rows = connection.execute("SELECT relname, reloptions FROM pg_class WHERE reloptions IS NOT NULL").fetchall()
    return dict(rows)


def test_tables_of_events_are_vacuumed_after_few_new_rows(postgres_url: PostgresUrl) -> None:
    options = storage_options(postgres_url)
    for table in ("event_log", "tip_views", "tip_feedback"):
        assert options[table] == ["autovacuum_vacuum_insert_scale_factor=0.01"]


def test_partitions_are_vacuumed_after_few_new_rows_when_a_table_is_partitioned(postgres_url: PostgresUrl) -> None:
    drop_tables(postgres_url)
    command.upgrade(configuration(postgres_url), "0014")
    with psycopg.connect(postgres_url.url) as connection:
        connection.execute("ALTER TABLE event_log RENAME TO whole")
        connection.execute("CREATE TABLE event_log (LIKE whole INCLUDING ALL) PARTITION BY HASH (user_id)")
        connection.execute("DROP TABLE whole")
        connection.execute("CREATE TABLE one PARTITION OF event_log FOR VALUES WITH (MODULUS 1, REMAINDER 0)")
    migrate(postgres_url)
    options = storage_options(postgres_url)
    for table in ("one", "tip_views", "tip_feedback"):
        assert options[table] == ["autovacuum_vacuum_insert_scale_factor=0.01"]


def test_indexes_serve_the_same_queries(postgres_url: PostgresUrl, database_path: Path) -> None:
    there, here = schema(postgres_url), schema(database_path)
    for name, table in here.items():
        assert there[name]["indexes"] >= table["indexes"] - BY_PRIMARY_KEY, name


def test_unique_keys_of_partitioned_tables_contain_the_user(postgres_url: PostgresUrl) -> None:
    with psycopg.connect(postgres_url.url) as connection:
        rows = connection.execute(SELECT_UNIQUE).fetchall()
    assert {table for table, _ in rows} >= KEYED_BY_USER
    assert [(table, key) for table, key in rows if table in KEYED_BY_USER and "user_id" not in key] == []


def test_each_new_database_has_its_own_secrets(postgres_url: PostgresUrl) -> None:
    found = set()
    for _ in range(2):
        drop_tables(postgres_url)
        migrate(postgres_url)
        with psycopg.connect(postgres_url.url) as connection:
            found |= set(connection.execute("SELECT name, value FROM service").fetchall())
    assert len(found) == 4


def test_database_is_migrated_once_when_two_programs_start(postgres_url: PostgresUrl) -> None:
    drop_tables(postgres_url)
    with ThreadPoolExecutor() as threads:
        results = list(threads.map(migrate_alone, [postgres_url] * 2))
    assert results == [0, 0]
    assert current(postgres_url) == SCHEMA_REVISION


def test_nothing_is_migrated_when_a_table_is_in_the_way(postgres_url: PostgresUrl) -> None:
    drop_tables(postgres_url)
    with psycopg.connect(postgres_url.url) as connection:
        connection.execute("CREATE TABLE rollout_looks (note text)")
    before = dump(postgres_url)
    with pytest.raises(StoreUnavailable, match="rollout_looks"):
        migrate(postgres_url)
    assert dump(postgres_url) == before


def test_migration_fails_soon_when_a_transaction_holds_a_table(postgres_url: PostgresUrl) -> None:
    """Every later statement about the table waits behind the migration."""
    drop_tables(postgres_url)
    command.upgrade(configuration(postgres_url), "0012")
    with psycopg.connect(postgres_url.url) as holder, ThreadPoolExecutor() as threads:
        holder.execute("SELECT * FROM outbox")
        migrating = threads.submit(migrate, postgres_url)
        try:
            with pytest.raises(StoreUnavailable, match="try again when it has ended"):
                migrating.result(timeout=PATIENCE_S)
        finally:
            holder.rollback()
    assert migrate(postgres_url) == ("0012", SCHEMA_REVISION)


def test_database_is_refused_when_this_program_is_older(postgres_url: PostgresUrl) -> None:
    with psycopg.connect(postgres_url.url) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaMismatch, match="9999"):
        migrate(postgres_url)


def test_database_is_migrated_by_alembic_itself(postgres_url: PostgresUrl) -> None:
    drop_tables(postgres_url)
    environment = environment_of(database=postgres_url.url)
    subprocess.run([sys.executable, "-m", "alembic", "upgrade", "head"], cwd=ROOT, env=environment, check=True)
    assert current(postgres_url) == SCHEMA_REVISION


def test_server_is_unavailable_when_none_listens(postgres_url: PostgresUrl) -> None:
    with pytest.raises(
        StoreUnavailable,
        match=r"the database at postgresql://nobody@127.0.0.1:1/x: the database does not answer: connection",
    ):
        migrate(parsed("postgresql://nobody:secret@127.0.0.1:1/x"))
