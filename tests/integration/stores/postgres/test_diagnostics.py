"""`profiles doctor` on PostgreSQL: each fault is named, and a sound database passes."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest

from app.errors import StoreUnavailable
from app.operations.doctor import Line
from app.settings import Settings
from app.settings.parsers import PostgresUrl
from app.settings.parsers import postgres_url as parsed
from app.stores.migrate import migrate
from app.stores.postgres.connection import Connection, connect
from app.stores.postgres.diagnostics import diagnose_connections, diagnose_database, diagnose_durability
from app.stores.postgres.features import check_features
from app.stores.sql.database import SCHEMA_REVISION
from tests.support.postgres import USER, PgBouncer, PostgresServer, StartPostgres, drop_tables
from tests.support.processes import ROOT
from tests.support.readme import blocks_of
from tests.support.registry import REGISTRY

DAYS = {"events": 180, "decisions": 180}
OWNER = "owner"
Lines = dict[str, Line]


def look(url: PostgresUrl | str, *, whole: bool = False, ahead_s: float = 0, **settings: Any) -> Lines:
    """The lines of the report by the name of the check."""
    url = parsed(url) if isinstance(url, str) else url
    lines, _ = diagnose_database(
        Settings(database=url, **settings), url, DAYS, whole=whole, now_s=lambda: time.time() - ahead_s
    )
    assert all(bool(line.remedy) == (line.state != "ok") for line in lines), "a fault without a remedy"
    return {line.check: line for line in lines}


def execute(url: PostgresUrl, *statements: str) -> None:
    with psycopg.connect(url.url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


@pytest.fixture
def durable_url(start_postgres: StartPostgres) -> Iterator[PostgresUrl]:
    """A migrated database of a role that is no superuser, on a server with the default settings."""
    server = start_postgres(fsync="on", full_page_writes="on")
    server.execute(f"CREATE ROLE {OWNER} LOGIN")
    server.execute(f"CREATE DATABASE owned OWNER {OWNER}")
    url = parsed(server.url("owned").replace("profiles@", f"{OWNER}@"))
    migrate(url)
    yield url
    server.close()


def test_only_samples_are_missing_when_nothing_is_wrong(durable_url: PostgresUrl) -> None:
    lines = look(durable_url, whole=True)
    assert {name for name, line in lines.items() if line.state != "ok"} == {"samples"}
    assert lines.keys() == {
        *("database", "durability", "standbys", "autovacuum", "encoding", "rights", "encryption", "pooler"),
        *("connections", "database clock", "integrity", "outbox", "invalidations", "event times", "decision ids"),
        *("dead letters", "evidence", "priors", "samples", "audit", "features", "retention"),
    }
    assert "integrity" not in look(durable_url)


def test_durability_is_bad_when_a_setting_loses_commits(postgres_url: PostgresUrl, durable_url: PostgresUrl) -> None:
    assert look(postgres_url)["durability"].text.startswith("fsync is off")
    execute(durable_url, f"ALTER ROLE {OWNER} SET synchronous_commit = off")
    assert look(durable_url)["durability"].text.startswith("synchronous_commit is off")
    half = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "off"}
    assert diagnose_durability(half).state == "warn"


def test_standbys_are_reported(start_postgres: StartPostgres) -> None:
    server = start_postgres()
    migrate(parsed(server.url()))
    assert look(server.url())["standbys"].state == "ok"
    standby = server.standby("other", synchronous=False)
    assert look(server.url())["standbys"].state == "warn"
    server.wait_for("other")
    assert look(server.url())["standbys"].text == "commits wait for 1 of 1 synchronous standbys (other)"
    server.execute("CREATE ROLE plain LOGIN")
    server.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO plain")
    assert "may not see" in look(server.url().replace("profiles@", "plain@"))["standbys"].text
    found = look(standby.url())["database"]
    assert found.state == "bad"
    assert "A standby takes no writes" in found.remedy
    both = f"postgresql://{USER}@{standby.host}:{standby.port},{server.host}:{server.port}/postgres"
    drop_tables(parsed(server.url()))
    assert migrate(parsed(both)) == (None, SCHEMA_REVISION)
    assert look(both)["database"].state == "ok"
    standby.stop()
    assert look(server.url())["standbys"].state == "bad"


def test_rights_are_reported(postgres_url: PostgresUrl) -> None:
    assert "superuser" in look(postgres_url)["rights"].text
    execute(
        postgres_url,
        "DROP ROLE IF EXISTS reader",
        "CREATE ROLE reader LOGIN",
        "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader",
    )
    reader = postgres_url.url.replace("profiles@", "reader@")
    assert look(reader)["rights"].text.startswith("the role reader lacks rights on audit_trail, audit_trail_id_seq, ")
    execute(
        postgres_url,
        "GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO reader",
        "GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO reader",
    )
    assert look(reader)["rights"].state == "ok"
    name = psycopg.conninfo.conninfo_to_dict(postgres_url.url)["dbname"]
    execute(postgres_url, f"REVOKE TEMPORARY ON DATABASE {name} FROM PUBLIC")
    assert look(reader)["rights"].text == "the role reader lacks rights on temporary tables"
    with closing(connect(reader).raw) as raw, pytest.raises(StoreUnavailable, match="GRANT TEMPORARY"):
        check_features(REGISTRY, Connection(raw))
    execute(postgres_url, "DROP OWNED BY reader", "DROP ROLE reader")


def test_rights_of_the_readme_suffice(start_postgres: StartPostgres) -> None:
    server = start_postgres()
    create, grant = (block.code for block in blocks_of(ROOT / "docker/README.md") if block.language == "sql")
    for statement in create.strip().split("\n"):
        server.execute(statement.replace("ROLE profiles", "ROLE owning").replace("OWNER profiles", "OWNER owning"))
    owner = server.url("profiles").replace(f"{USER}@", "owning@")
    migrate(parsed(owner))
    server.execute("CREATE ROLE service LOGIN")
    service = owner.replace("owning@", "service@")
    assert look(service)["database"].state == "bad"
    execute(parsed(owner), *grant.strip().split("\n"))
    assert {look(url)["rights"].state for url in (owner, service)} == {"ok"}
    execute(parsed(owner), "CREATE TABLE later (id bigint GENERATED BY DEFAULT AS IDENTITY)")  # as a migration does
    assert look(service)["rights"].state == "ok"


def test_clock_is_bad_when_it_is_wrong(postgres_url: PostgresUrl) -> None:
    assert look(postgres_url)["database clock"].state == "ok"
    found = look(postgres_url, ahead_s=40)["database clock"]
    assert found.state == "bad"
    assert re.fullmatch(r"it is (39|4\d)\.\d s ahead of this machine's clock", found.text)


def test_connections_are_too_few_when_processes_need_more(postgres_url: PostgresUrl) -> None:
    assert look(postgres_url)["connections"].state == "ok"
    assert look(postgres_url, processes=20)["connections"].state == "warn"
    server = {"max_connections": "100", "superuser_reserved_connections": "3"}
    assert diagnose_connections(server, [None, None], 9, 10).state == "ok"
    assert diagnose_connections(server, [None, 50], 9, 10).state == "warn"


def test_old_or_foreign_database_is_named(postgres: PostgresServer, postgres_url: PostgresUrl) -> None:
    assert "not migrated" in look(postgres.url("postgres"))["database"].text
    execute(postgres_url, "UPDATE alembic_version SET version_num = '0001'")
    assert "is at revision 0001" in look(postgres_url)["database"].text
    assert "does not answer" in look("postgresql://me:secret@127.0.0.1:1/x")["database"].text
    assert "secret" not in str(look("postgresql://me:secret@127.0.0.1:1/x"))


def test_encoding_is_bad_when_it_is_not_utf8(postgres: PostgresServer) -> None:
    postgres.execute("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
    migrate(parsed(postgres.url("latin")))
    assert look(postgres.url("latin"))["encoding"].state == "bad"
    postgres.execute("DROP DATABASE latin")


def test_event_without_a_fact_is_found(postgres_url: PostgresUrl) -> None:
    execute(
        postgres_url,
        "INSERT INTO event_log (seq, event_id, subject, user_id, digest, occurred_at_ms, received_at_ms) "
        "VALUES (7, 'e', 's', 'u', '', 0, 0)",
    )
    assert look(postgres_url, whole=True)["integrity"].text == "it is damaged: event 7 has no fact"


@pytest.mark.parametrize(("mode", "state"), [("session", "ok"), ("transaction", "bad")])
def test_pooler_must_keep_sessions(
    postgres_url: PostgresUrl, pgbouncer: Callable[[str], PgBouncer], mode: str, state: str
) -> None:
    url = pgbouncer(mode).url(postgres_url.url.rpartition("/")[2])
    found = look(url)["pooler"]
    assert found.state == state
    assert found.text.startswith("a pooler ")
