"""PostgreSQL servers for tests, from Debian's package. If it is missing, tests are skipped, and fail in CI.

PostgreSQL does not run as root. If the tests do, its processes run as another account, in directories of that account.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest

from app.settings.parsers import PostgresUrl
from app.settings.parsers import postgres_url as parsed
from app.stores.migrate import migrate
from tests.support.processes import await_listener, free_port
from tests.support.programs import missing, required
from tests.support.waiting import PATIENCE_S, eventually_sync

USER = "profiles"
ACCOUNTS = ("postgres", "nobody")
TEMPLATE = "profiles_template"
TABLES = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
DISCONNECT_OTHERS = """SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()"""
# Small, and not durable: a crash of the machine may damage it.
OPTIONS = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "max_connections": "60",
    "max_wal_size": "128MB",
    "autovacuum_naptime": "10s",
    "log_min_messages": "warning",
}


def found_binaries() -> Path | None:
    """The directory of PostgreSQL's newest binaries; None if it is missing."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = versions[-1] if versions else shutil.which("initdb")
    return Path(found).resolve().parent if found is not None else None


def binaries() -> Path:
    """The same. If it is missing, the test is skipped, or fails in CI."""
    return found_binaries() or missing("PostgreSQL is missing: apt-get install postgresql")


def account() -> str | None:
    """The account that runs PostgreSQL; None for the current one."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ACCOUNTS if name in known)


def as_account(*command: str | Path) -> list[str]:
    """The command, as it is run by the account. The process is killed when the thread that starts it ends."""
    found = ["setpriv", "--pdeathsig", "QUIT"] if shutil.which("setpriv") else []
    if (name := account()) is not None:
        entry = pwd.getpwnam(name)
        found += [f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]
    return [*found, "--", *map(str, command)] if found else [str(part) for part in command]


class PostgresServer:
    """One server on a Unix socket and a loopback port, with a data directory of its own below `root`."""

    def __init__(self, root: Path, name: str = "main", *, prefix: tuple[str, ...] = (), **options: str) -> None:
        """`options` are set in addition to `OPTIONS`. `prefix` is run before the server, such as `ip netns exec …`."""
        self.data = root / name
        self.port = free_port()
        self.host = "127.0.0.1"
        self.options = {**OPTIONS, **options}
        self._root = root
        self._prefix = prefix
        self._log = root / f"{name}.log"
        self._child: subprocess.Popen[bytes] | None = None
        self._standbys: list[PostgresServer] = []

    def create(self) -> None:
        """Create the data directory."""
        self._run("initdb", "-D", self.data, "-A", "trust", "-U", USER, "-E", "UTF8", "--locale=C", "--no-sync")

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        settings = {
            "port": str(self.port),
            "listen_addresses": self.host,
            "unix_socket_directories": str(self._root),
            **self.options,
        }
        given = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        command = as_account(binaries() / "postgres", "-D", self.data, *given)
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                [*self._prefix, *command],
                cwd=self._root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C must not reach it before its clients
            )
        eventually_sync(lambda: self.answers() or not self.running)
        assert self.running, self.log

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    @property
    def log(self) -> str:
        return self._log.read_text()

    def url(self, database: str = "postgres", *, tcp: bool = False) -> str:
        """The URL of a database, by the Unix socket or the loopback port."""
        host = self.host if tcp else quote(str(self._root), safe="")
        return f"postgresql://{USER}@{host}:{self.port}/{database}"

    def execute(self, statement: str, database: str = "postgres") -> list[Any]:
        """Run one statement on a new connection; its rows."""
        with closing(psycopg.connect(self.url(database), autocommit=True)) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def answers(self) -> bool:
        try:
            self.execute("SELECT 1")
        except psycopg.Error:
            return False
        return True

    def stop(self) -> None:
        """Stop the server, after it has disconnected its clients."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Stop the server and its clients' processes at once. It recovers when it starts again."""
        self._end(signal.SIGQUIT)

    def close(self) -> None:
        """Kill the server and its standbys."""
        for server in (*self._standbys, self):
            server.kill()

    def restart(self, *, kill: bool = False) -> None:
        self._end(signal.SIGQUIT if kill else signal.SIGINT)
        self.start()

    def signal(self, number: int) -> None:
        """Send a signal to every process of the server, such as SIGSTOP and SIGCONT."""
        os.killpg(self.pid, number)
        for child in subprocess.run(
            ["pgrep", "-P", str(self.pid)], capture_output=True, text=True, check=False
        ).stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(child), number)

    def standby(self, name: str, *, synchronous: bool = True) -> PostgresServer:
        """A started standby. If it is synchronous, commits of this server wait for it from now on."""
        standby = PostgresServer(self._root, name, prefix=self._prefix, **self.options)
        standby.options.pop("synchronous_standby_names", None)
        self._standbys.append(standby)
        standby.follow(self, self.url(), synchronous=synchronous)
        return standby

    def follow(self, primary: PostgresServer, url: str, *, synchronous: bool = True) -> None:
        """Copy the data of a primary, which this server reaches at `url`, and start as its standby."""
        name = self.data.name
        shutil.rmtree(self.data, ignore_errors=True)
        source = f"{url}?application_name={name}"
        self._run("pg_basebackup", "-D", self.data, "-R", "-X", "stream", "-c", "fast", "--no-sync", "-d", source)
        self.start()
        eventually_sync(lambda: primary._state(name) == "streaming")
        if synchronous:
            primary.wait_for(name)

    def wait_for(self, name: str) -> None:
        """Make each commit of this server wait for a standby; with an empty name, for none."""
        self.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
        self.execute("SELECT pg_reload_conf()")
        if name:
            eventually_sync(lambda: self._state(name, "sync_state") == "sync")

    def promote(self) -> None:
        """Make this standby a primary, which waits for no standby."""
        self.execute("SELECT pg_promote()")
        eventually_sync(lambda: self.execute("SELECT pg_is_in_recovery()") == [(False,)])
        self.wait_for("")

    def _state(self, name: str, column: str = "state") -> str | None:
        rows = self.execute(f"SELECT {column} FROM pg_stat_replication WHERE application_name = '{name}'")
        return str(rows[0][0]) if rows else None

    def _run(self, program: str, *arguments: str | Path) -> None:
        command = [*self._prefix, *as_account(binaries() / program, *arguments)]
        done = subprocess.run(command, cwd=self._root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def _end(self, number: int) -> None:
        if self._child is not None:
            with suppress(ProcessLookupError):
                self.signal(signal.SIGCONT)
            self._child.send_signal(number)
            self._child.wait(PATIENCE_S)
        self._child = None


class PgBouncer:
    """A PgBouncer in front of a server, from Debian's package."""

    def __init__(self, server: PostgresServer, directory: Path, mode: str) -> None:
        """`mode`: `session` or `transaction`."""
        path = required("pgbouncer")
        self.port = free_port()
        config = directory / f"pgbouncer{self.port}.ini"
        config.write_text(
            f"[databases]\n* = host={server.host} port={server.port} user={USER}\n[pgbouncer]\npool_mode = {mode}\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\nauth_type = any\n"
        )
        config.chmod(0o644)
        log = config.with_suffix(".log").open("wb")
        with log:
            self._child = subprocess.Popen(
                as_account(path, config), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        await_listener(self.port)

    def url(self, database: str) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def close(self) -> None:
        self._child.kill()
        self._child.wait(PATIENCE_S)


StartPostgres = Callable[..., PostgresServer]


@contextmanager
def servers() -> Iterator[StartPostgres]:
    """Creates and starts servers. All are stopped when the block ends."""
    binaries()
    root = Path(tempfile.mkdtemp(prefix="pf-pg-", dir="/tmp"))  # a socket's path holds 107 bytes
    root.chmod(0o755)
    if (name := account()) is not None:
        shutil.chown(root, name)
    started: list[PostgresServer] = []

    def start(prefix: tuple[str, ...] = (), **options: str) -> PostgresServer:
        server = PostgresServer(root, f"server{len(started)}", prefix=prefix, **options)
        started.append(server)
        server.create()
        server.start()
        return server

    try:
        yield start
    finally:
        for server in started:
            server.close()
        shutil.rmtree(root)


@pytest.fixture(scope="session")
def start_postgres() -> Iterator[StartPostgres]:
    with servers() as start:
        yield start


@pytest.fixture(scope="session")
def postgres(start_postgres: StartPostgres) -> PostgresServer:
    """A server for the whole run, with a migrated template database."""
    server = start_postgres()
    server.execute(f"CREATE DATABASE {TEMPLATE}")
    migrate(parsed(server.url(TEMPLATE)))
    return server


_names = count(1)


def new_database(postgres: PostgresServer) -> PostgresUrl:
    """A migrated, empty database."""
    name = f"test{next(_names)}"
    postgres.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    postgres.execute(f"UPDATE service SET value = '{name}' WHERE name = 'database_id'", name)
    return parsed(postgres.url(name))


def drop_tables(database: PostgresUrl) -> None:
    """Leave the database as it was before it was migrated."""
    with closing(psycopg.connect(database.url, autocommit=True)) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> Iterator[PostgresUrl]:
    """A migrated, empty database of one test."""
    database = new_database(postgres)
    yield database
    postgres.execute(f"DROP DATABASE {psycopg.conninfo.conninfo_to_dict(database.url)['dbname']} WITH (FORCE)")


class ReusedDatabase:
    """A database for many tests, one after another: to empty it takes a tenth of the time that a new one does."""

    def __init__(self, postgres: PostgresServer) -> None:
        self._url = new_database(postgres)
        with closing(psycopg.connect(self._url.url, autocommit=True)) as connection:
            self._tables = [str(name) for (name,) in connection.execute(TABLES)]
            self._sequences = [str(name) for (name,) in connection.execute("SELECT sequencename FROM pg_sequences")]
            self._migrated = {table: self._copied(connection, table) for table in self._tables}

    @staticmethod
    def _copied(connection: psycopg.Connection[Any], table: str) -> bytes:
        with connection.cursor().copy(f"COPY {table} TO STDOUT".encode()) as copied:
            return b"".join(map(bytes, copied))

    def emptied(self) -> PostgresUrl:
        """The database as migration left it, with a new id and no other connection."""
        with closing(psycopg.connect(self._url.url)) as connection:
            connection.execute(DISCONNECT_OTHERS)
            connection.execute("; ".join(f"DELETE FROM {table}" for table in self._tables).encode())
            for table, rows in self._migrated.items():
                if rows:
                    with connection.cursor().copy(f"COPY {table} FROM STDIN".encode()) as copy:
                        copy.write(rows)
            connection.execute("; ".join(f"ALTER SEQUENCE {name} RESTART" for name in self._sequences).encode())
            connection.execute("UPDATE service SET value = %s WHERE name = 'database_id'", (f"test{next(_names)}",))
            connection.commit()
        return self._url


@pytest.fixture(scope="session")
def reused_database(postgres: PostgresServer) -> ReusedDatabase:
    return ReusedDatabase(postgres)


@pytest.fixture
def pgbouncer(postgres: PostgresServer) -> Iterator[Callable[[str], PgBouncer]]:
    """Starts PgBouncers in a mode, in front of `postgres`."""
    started: list[PgBouncer] = []

    def start(mode: str) -> PgBouncer:
        started.append(PgBouncer(postgres, postgres.data.parent, mode))
        return started[-1]

    yield start
    for bouncer in started:
        bouncer.close()
