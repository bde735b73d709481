"""Diagnoses a PostgreSQL database and its server for `profiles doctor`. It changes nothing."""

import re
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import psycopg

from app.errors import SchemaMismatch, StoreUnavailable
from app.operations.doctor import NOT_MIGRATED, Line, diagnose_clock
from app.operations.samples import Sample
from app.settings import Settings
from app.settings.parsers import PostgresUrl
from app.stores.postgres.connection import Connection, connect, revision_of, unavailable
from app.stores.postgres.database import WRITERS
from app.stores.sql.database import SPARE_READERS, check_revision
from app.stores.sql.diagnostics import diagnose_contents
from app.stores.sql.event_log import FINDINGS, SELECT_FAULTS

LEAST_VERSION = 150_000
MIB = 2**20
POOLER_TRIES = 5
SELECT_PID = "SELECT pg_backend_pid()"
SELECT_SETTINGS = """
SELECT name, setting FROM pg_settings WHERE name IN (
    'autovacuum', 'track_counts', 'fsync', 'full_page_writes', 'synchronous_commit', 'synchronous_standby_names',
    'server_encoding', 'server_version', 'server_version_num', 'max_connections', 'superuser_reserved_connections'
)
"""
SELECT_ROLE = """
SELECT pg_database_size(current_database()), rolname, rolsuper, NULLIF(rolconnlimit, -1), NULLIF(datconnlimit, -1)
FROM pg_roles, pg_database WHERE rolname = current_user AND datname = current_database()
"""
# A role without the rights of pg_monitor sees the rows, but not their contents.
SELECT_STANDBYS = """
SELECT COUNT(*), COUNT(sync_state), COUNT(*) FILTER (WHERE sync_state IN ('sync', 'quorum')) FROM pg_stat_replication
"""
SELECT_DENIED = """
SELECT relname FROM pg_class WHERE relnamespace = CAST(current_schema() AS regnamespace) AND CASE
    WHEN relkind = 'S' THEN NOT has_sequence_privilege(oid, 'USAGE')
    WHEN relname = 'alembic_version' THEN NOT has_table_privilege(oid, 'SELECT')
    WHEN relkind IN ('r', 'p') THEN NOT (
        has_table_privilege(oid, 'SELECT') AND has_table_privilege(oid, 'INSERT')
        AND has_table_privilege(oid, 'UPDATE') AND has_table_privilege(oid, 'DELETE')
    ) END
UNION ALL
SELECT 'temporary tables' WHERE NOT has_database_privilege(current_database(), 'TEMPORARY')
ORDER BY relname
"""


def diagnose_database(
    settings: Settings,
    url: PostgresUrl,
    days: Mapping[str, int],
    *,
    whole: bool,
    now_s: Callable[[], float] = time.time,
) -> tuple[list[Line], list[Sample]]:
    """Diagnose the server and the contents of the database. Return the report lines, and the newest metric sample of
    each process. `days`: the retention of `events` and of `decisions`, in days. `whole`: also read every event."""
    try:
        with closing(connect(url.url)) as connection:
            connection.raw.prepare_threshold = None  # behind some poolers, prepared statements fail
            check_revision(revision_of(connection), connection.raw.info.dbname)
            if whole:
                connection.execute("SET statement_timeout = 0")
            server: dict[str, str] = dict(connection.execute(SELECT_SETTINGS).fetchall())
            size, role, is_super, *limits = _row(connection, SELECT_ROLE)
            before_s = now_s()
            [theirs_s] = _row(connection, "SELECT EXTRACT(EPOCH FROM clock_timestamp())")
            clock = diagnose_clock("database", before_s, float(theirs_s), now_s())
            contents, running = diagnose_contents(connection, round(now_s() * 1000), days, whole=whole)
            # One process more, for a release that is being replaced.
            processes = max(settings.processes + 1, len(running)) + 1
            lines = [
                _release(server, f"{url} answers and is migrated ({size / MIB:,.1f} MiB)"),
                diagnose_durability(server),
                diagnose_standbys(server, *_row(connection, SELECT_STANDBYS)),
                _autovacuum(server),
                _encoding(server),
                _rights(connection, role, is_super=is_super),
                _encryption(connection),
                _pooler(connection, url),
                diagnose_connections(server, limits, processes, settings.readers + SPARE_READERS + WRITERS + 1),
                clock,
            ]
            return [*lines, *([_integrity(connection)] if whole else []), *contents], running
    except SchemaMismatch as error:
        return [Line("database", "bad", str(error), NOT_MIGRATED)], []
    except (StoreUnavailable, psycopg.Error) as error:
        text = str(unavailable(error) if isinstance(error, psycopg.Error) else error)
        remedy = f"Start the server, or correct PROFILES_DATABASE ({url})."
        if "read-only" in text or "hot standby" in text:
            remedy = "Name the primary, or every server: postgresql://host1,host2/name. A standby takes no writes."
        return [Line("database", "bad", text, remedy)], []


def _row(connection: Connection, statement: str) -> Any:
    return connection.execute(statement).fetchone()


def _release(server: Mapping[str, str], text: str) -> Line:
    if int(server["server_version_num"]) < LEAST_VERSION:
        return Line("database", "bad", f"PostgreSQL {server['server_version']} is too old", "Run version 15 or later.")
    return Line("database", "ok", f"{text}, PostgreSQL {server['server_version'].split(' ')[0]}")


def diagnose_durability(server: Mapping[str, str]) -> Line:
    """Report whether an acknowledged event survives a crash of the server. `server` holds its settings."""
    if server["fsync"] == "off":
        text = "fsync is off: a crash of the server's machine can damage the database beyond repair"
        return Line("durability", "bad", text, "Set fsync = on.")
    if server["synchronous_commit"] == "off":
        text = "synchronous_commit is off: a crash of the server loses acknowledged events"
        return Line("durability", "bad", text, "Set synchronous_commit = on, also for the role and the database.")
    if server["full_page_writes"] == "off":
        text = "full_page_writes is off: a crash can damage pages, unless the file system writes each page as a whole"
        return Line("durability", "warn", text, "Set full_page_writes = on.")
    return Line("durability", "ok", f"commits wait for the disk (synchronous_commit = {server['synchronous_commit']})")


def diagnose_standbys(server: Mapping[str, str], connected: int, visible: int, synchronous: int) -> Line:
    """Report whether commits wait for a standby, so that a failover loses no acknowledged event. The
    numbers count standbys: `connected` all that are connected, `visible` those whose state the role may see, and
    `synchronous` those in the state `sync` or `quorum`."""
    names = server["synchronous_standby_names"].strip()
    if not names and not connected:
        return Line("standbys", "ok", "there is none, so nothing to fail over to")
    if not names:
        text = f"commits wait for none of {connected} standbys: a failover can lose acknowledged events"
        return Line("standbys", "warn", text, "Name a standby in synchronous_standby_names.")
    if server["synchronous_commit"] == "local":
        text = "synchronous_commit is local, so commits do not wait for the synchronous standbys"
        return Line("standbys", "warn", text, "Set synchronous_commit = on, also for the role and the database.")
    if visible < connected:
        remedy = "GRANT pg_monitor to the role, or look at pg_stat_replication as an administrator."
        return Line("standbys", "warn", "the role may not see the state of the standbys", remedy)
    found = re.match(r"(?:FIRST|ANY)?\s*(\d+)\s*\(", names, re.IGNORECASE)
    wanted = int(found[1]) if found else 1
    if synchronous < wanted:
        text = f"{synchronous} of {wanted} synchronous standbys are connected ({names}): every commit waits"
        return Line("standbys", "bad", text, "Start the standby, or take it out of synchronous_standby_names.")
    return Line("standbys", "ok", f"commits wait for {wanted} of {synchronous} synchronous standbys ({names})")


def _autovacuum(server: Mapping[str, str]) -> Line:
    if off := [name for name in ("autovacuum", "track_counts") if server[name] == "off"]:
        text = f"{' and '.join(off)} off: dead rows are never removed, and the outbox and statistics of users grow"
        return Line("autovacuum", "bad", text, "Set autovacuum = on and track_counts = on.")
    return Line("autovacuum", "ok", "it is on")


def _encoding(server: Mapping[str, str]) -> Line:
    if (encoding := server["server_encoding"]) != "UTF8":
        text = f"the database has the encoding {encoding}, so some ids cannot be stored"
        return Line("encoding", "bad", text, "Create a database with ENCODING 'UTF8', and migrate that one.")
    return Line("encoding", "ok", "UTF8")


def _rights(connection: Connection, role: str, *, is_super: bool) -> Line:
    if denied := [name for (name,) in connection.execute(SELECT_DENIED).fetchall()]:
        text = f"the role {role} lacks rights on {', '.join(denied[:FINDINGS])}"
        rights = "SELECT, INSERT, UPDATE, DELETE on the tables, USAGE on the sequences and TEMPORARY on the database"
        return Line("rights", "bad", text, f"GRANT {rights}, or use the owner.")
    if is_super:
        return Line("rights", "warn", f"the role {role} is a superuser", "Use a role that owns only this database.")
    return Line("rights", "ok", f"the role {role} has the rights that it needs")


def _encryption(connection: Connection) -> Line:
    server = connection.raw.info
    if connection.raw.pgconn.ssl_in_use:
        return Line("encryption", "ok", "connections use TLS")
    if server.host.startswith("/") or server.hostaddr in ("127.0.0.1", "::1"):
        return Line("encryption", "ok", "connections do not leave this machine")
    text = f"connections to {server.host} are not encrypted"
    return Line("encryption", "warn", text, "Add ?sslmode=verify-full to PROFILES_DATABASE, and sslrootcert if needed.")


def _pooler(connection: Connection, url: PostgresUrl) -> Line:
    """Report whether a connection pooler shares PostgreSQL's connections between transactions. A pooler is recognised
    by the process id received at the start of a connection: it differs from the one that `pg_backend_pid()` returns."""
    if _row(connection, SELECT_PID)[0] == connection.raw.info.backend_pid:
        return Line("pooler", "ok", "connections reach PostgreSQL directly")
    with closing(connect(url.url)) as other:
        other.raw.prepare_threshold = None
        seen = {(_row(connection, SELECT_PID), _row(other, SELECT_PID)) for _ in range(POOLER_TRIES)}
    if len(seen) == 1 and all(one != two for one, two in seen):
        return Line("pooler", "ok", "a pooler keeps a server connection for each connection of the service")
    text = "a pooler shares server connections between transactions, so session settings and prepared statements leak"
    remedy = "Set pool_mode = session for this database in PgBouncer, or connect to PostgreSQL directly."
    return Line("pooler", "bad", text, remedy)


def diagnose_connections(server: Mapping[str, str], limits: list[int | None], processes: int, connections: int) -> Line:
    """Report whether the server allows the connections of all processes: up to `connections` for each of `processes`.
    `limits`: the connection limits of the role and of the database, None for no limit."""
    total = int(server["max_connections"]) - int(server["superuser_reserved_connections"])
    allowed = min([total, *(limit for limit in limits if limit is not None)])
    text = f"{processes} processes open up to {processes * connections} connections, and the server allows {allowed}"
    if processes * connections <= allowed:
        return Line("connections", "ok", text)
    return Line("connections", "warn", text, "Raise max_connections or the role's limit, or lower PROFILES_READERS.")


def _integrity(connection: Connection) -> Line:
    if found := [f"event {seq} {fault}" for seq, fault in connection.execute(SELECT_FAULTS).fetchall()]:
        remedy = "Check the server with pg_amcheck, and restore a base backup if it finds damage."
        return Line("integrity", "bad", f"it is damaged: {'; '.join(found)}", remedy)
    return Line("integrity", "ok", "every event has its fact, and every fact its event")
