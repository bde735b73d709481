"""`profiles doctor` on real servers and files: each fault is named, and a sound deployment passes."""

import os
import resource
import signal
import sqlite3
import stat
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from app.bandit.model.inputs import SPEC_V1, SPEC_V2
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.features.clock import DAY_MS
from app.operations.component_states import ComponentView
from app.operations.samples import Sample
from app.settings import hash_key
from app.stores.queue.client import HEALTH_KEY, HEALTH_SUFFIX
from app.stores.sql.samples import ASIDE
from app.stores.sqlite.diagnostics import diagnose_file_system
from app.stores.valkey.embedded import EmbeddedServer
from tests.integration.cli.conftest import Outcome, Run
from tests.support.registry import own_entry, own_registry
from tests.support.servers import VALKEY, StartServer, ask
from tests.support.small_disk import small_file_system
from tests.support.traffic import now_ms

STRONG = f"ops:admin:{hash_key('pk_3v8Jq0bKpYw2s9TfHnE7').hex()}"
# Checks that depend on the machine.
OF_THE_MACHINE = {"sqlite", "file system", "disk space", "open files"}


class Deployment(NamedTuple):
    """The doctor's subject: sound unless a test changes it."""

    profiles: Run
    database: Path
    cache: EmbeddedServer
    queue: EmbeddedServer

    def look(self, *arguments: str, **settings: object) -> Outcome:
        given: dict[str, object] = {"cache_url": self.cache.url, "queue_url": self.queue.url, "api_keys": STRONG}
        return self.profiles("doctor", *arguments, **(given | settings))

    def lines(self, *arguments: str, **settings: object) -> dict[str, tuple[str, str]]:
        """State and text by the name of the check."""
        found = self.look("--json", *arguments, **settings).json
        assert all(bool(line["remedy"]) == (line["state"] != "ok") for line in found), "a fault without a remedy"
        return {line["check"]: (line["state"], line["text"]) for line in found}

    def execute(self, statement: str, *parameters: object) -> None:
        """Change the database past the service."""
        with closing(sqlite3.connect(self.database, isolation_level=None)) as connection:
            connection.execute(statement, parameters)


@pytest.fixture
def deployment(migrated: Run, tmp_path: Path, start_server: StartServer) -> Iterator[Deployment]:
    cache = start_server(VALKEY, options=("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru"))
    queue = start_server(VALKEY, options=("--appendonly", "yes"))
    ask(queue, "SET", HEALTH_KEY, "alive")
    made = Deployment(migrated, tmp_path / "var/profiles.db", cache, queue)
    made.execute("INSERT INTO samples (at_ms, process, body) VALUES (?, 'one', '{}')", now_ms())
    yield made
    cache.kill()
    queue.kill()


def test_all_checks_pass_when_nothing_is_wrong(deployment: Deployment) -> None:
    lines = deployment.lines()
    assert {check: line for check, line in lines.items() if line[0] != "ok" and check not in OF_THE_MACHINE} == {}
    assert lines.keys() == {
        *("database", "integrity", "wal", "rights", "outbox", "invalidations", "event times", "decision ids"),
        *("dead letters", "evidence", "retention"),
        *("priors", "samples", "audit", "features", "registry"),
        *("file system", "disk space", "sqlite", "open files"),
        *("cache", "cache writes", "cache clock", "cache memory"),
        *("queue", "queue writes", "queue clock", "queue eviction", "queue persistence", "worker", "separate"),
        *("keys", "weak keys"),
    }
    shown = deployment.look()
    assert shown.code == 0
    assert "0 bad" in shown.out
    assert ask(deployment.cache, "DBSIZE") == 0, "it leaves nothing behind"


def test_full_check_reads_the_whole_database(deployment: Deployment) -> None:
    assert deployment.lines("--full")["integrity"] == ("ok", "every page, row and index is intact")


# A command to one of the servers, and how a check then judges it.
SERVER_FAULTS = [
    ("cache", "CONFIG SET maxmemory 0", "cache memory", "warn", "no memory limit"),
    ("cache", "CONFIG SET maxmemory-policy noeviction", "cache memory", "warn", "noeviction"),
    ("queue", "CONFIG SET maxmemory 64mb maxmemory-policy volatile-lru", "queue eviction", "bad", "volatile-lru"),
    ("queue", "CONFIG SET maxmemory-policy allkeys-lru", "queue eviction", "warn", "with a memory limit"),
    ("queue", "CONFIG SET appendonly no", "queue persistence", "warn", "nothing to disk"),
    ("queue", "CONFIG SET appendonly no save 3600~1", "queue persistence", "warn", "only snapshots"),
    ("queue", f"DEL {HEALTH_KEY}", "worker", "bad", "no worker"),
    ("cache", "REPLICAOF 127.0.0.1 1", "cache writes", "bad", "it is a replica"),
    ("queue", "CONFIG SET maxmemory 1", "queue writes", "bad", "refuses writes: "),
    ("cache", "ACL SETUSER default -set", "cache writes", "bad", "it refuses a lease: NOPERM"),
    ("queue", "ZADD arq:queue:databases NOW one NOW other", "worker", "bad", "workers of 2 databases"),
    ("queue", "ZADD arq:queue:databases NOW a:7:01:9 NOW a:7:02:9 9e15 other", "worker", "ok", "a worker has reported"),
    ("cache", "kill", "cache", "bad", "it does not answer"),
    ("queue", "kill", "queue", "bad", "it does not answer"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "command", "check", "state", "text"), SERVER_FAULTS, ids=[row[4] for row in SERVER_FAULTS]
)
def test_server_fault_is_named(
    deployment: Deployment, which: str, command: str, check: str, state: str, text: str
) -> None:
    server: EmbeddedServer = getattr(deployment, which)
    if command == "kill":
        server.kill()
    else:
        ask(server, *(word.replace("~", " ") for word in command.replace("NOW", str(now_ms())).split()))
    found = deployment.lines()[check]
    assert found[0] == state
    assert text in found[1]


@pytest.mark.slow
def test_exit_code_is_of_the_worst_line(deployment: Deployment) -> None:
    ask(deployment.cache, *["CONFIG", "SET", "maxmemory-policy", "noeviction"])
    assert (deployment.look().code, deployment.look("--strict").code) == (0, 1)
    deployment.queue.kill()
    assert (deployment.look().code, deployment.look("--strict").code) == (1, 1)


@pytest.mark.slow
def test_doctor_gives_up_when_a_server_is_silent(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.stores.valkey.diagnostics.TIMEOUT_S", 0.2)
    deployment.cache.signal(signal.SIGSTOP)
    try:
        assert deployment.lines()["cache"][0] == "bad"
    finally:
        deployment.cache.signal(signal.SIGCONT)


@pytest.mark.slow
def test_shared_server_is_bad_when_it_evicts(deployment: Deployment) -> None:
    assert deployment.lines()["separate"][0] == "ok"
    assert deployment.lines(queue_url=deployment.cache.url)["separate"][0] == "bad"
    assert deployment.lines(cache_url=deployment.queue.url)["separate"][0] == "warn"


def test_servers_are_missing_when_no_setting_names_them(migrated: Run) -> None:
    done = migrated("doctor", "--json")
    assert done.code == 1
    lines = {line["check"]: line for line in done.json}
    for name in ("cache", "queue"):
        assert f"PROFILES_{name.upper()}_URL is not set" in lines[name]["text"]
    assert "separate" not in lines


OLD_MS = now_ms() - 600_000
EVENT = (
    "INSERT INTO event_log (event_id, subject, user_id, digest, occurred_at_ms, received_at_ms) "
    "VALUES ('e', 'signals.tip.served', 'u', x'00', {}, {})"
)
WAITING = f"INSERT INTO outbox (seq, user_id, received_at_ms) VALUES (1, 'u', {OLD_MS})"
LETTER = (
    "INSERT INTO dead_letters (source, payload, error, traceback, attempts, created_at_ms, last_failed_at_ms) "
    "VALUES ('queue', '{}', 'e', '', 1, 0, 0)"
)
UNKNOWN = f"INSERT INTO unknown_decisions VALUES ('shop', 12, {OLD_MS}), ('old', 1, {now_ms() - 90_000_000})"
OWED = "INSERT INTO owed_invalidations (user_id, owed_at_ms) VALUES ('u', 0)"
DAMAGED = f"INSERT INTO bandit_states VALUES ('u', '{ASIDE}{SPEC_V1.hash}', x'00', 1, 0, NULL, NULL)"
PRIORS = (
    "INSERT INTO bandit_priors (spec_hash, mu, users, decisions, changes, created_at_ms) "
    f"VALUES ('{SPEC_V2.hash}', x'00', 1, 1, 1, 0), ('of another release', x'00', 1, 1, 1, 0)"
)
DISABLED = "INSERT INTO disabled_features (feature, disabled_by, reason, disabled_at_ms) VALUES ('f', 'ann', 'slow', 0)"
ROW_FAULTS = [
    (
        f"INSERT INTO outbox (seq, user_id, received_at_ms) VALUES (1, 'u', {OLD_MS})",
        "outbox",
        "warn",
        "1 events wait for a worker, the oldest for",
    ),
    (UNKNOWN, "decision ids", "warn", "12 events sent by shop named no decision of the user."),
    (OWED, "invalidations", "warn", "owed to the cache: 1"),
    (EVENT.format(now_ms() + DAY_MS, 0), "event times", "warn", "in the future: 1"),
    (LETTER, "dead letters", "warn", "dead letters: 1"),
    (DAMAGED, "evidence", "bad", "damaged: 1"),
    (PRIORS, "priors", "bad", "priors: 1"),
    (DISABLED, "features", "warn", "f is disabled by ann at 1970-01-01T00:00:00.000Z: slow"),
    (f"UPDATE samples SET at_ms = {OLD_MS}", "samples", "warn", "the newest sample is"),
    ("DELETE FROM samples", "samples", "warn", "no process has ever"),
    ("UPDATE alembic_version SET version_num = '0001'", "database", "bad", "is at revision 0001"),
    ("UPDATE alembic_version SET version_num = '9999'", "database", "bad", "is newer (9999)"),
]


@pytest.mark.slow
def test_database_fault_is_named(deployment: Deployment) -> None:
    sound, before = deployment.database.read_bytes(), deployment.lines()
    for statement, check, state, text in ROW_FAULTS:
        deployment.execute(statement)
        found = deployment.lines()[check]
        assert (before[check][0], found[0], text in found[1]) == ("ok", state, True), found
        deployment.database.write_bytes(sound)


@pytest.mark.slow
def test_features_of_running_processes_are_reported(deployment: Deployment, tmp_path: Path) -> None:
    looks = {"features": ComponentView("degraded", "failing, and answered as null: f")}
    told = Sample(at_ms=now_ms(), process="two", role="api", seconds=10.0, components=looks, registry="0ther")
    body = msgspec.json.encode(told).decode()
    deployment.execute("INSERT INTO samples (at_ms, process, body) VALUES (?, 'two', ?)", told.at_ms, body)
    lines = deployment.lines()
    assert lines["features"] == ("bad", "failing, and answered as null: f")
    assert lines["registry"][0] == "warn"
    assert lines["registry"][1].startswith("running processes serve the registry 0ther, but these settings name ")
    broken = own_registry(tmp_path / "broken.py", own_entry("probe", "SELECT user_id FROM views"))
    for features, text in ((broken, "feature 'probe': "), (tmp_path / "none.py:R", "PROFILES_FEATURES: cannot load ")):
        state, shown = deployment.lines(features=features)["registry"]
        assert state == "bad"
        assert shown.startswith(f"it cannot be loaded: {text}")
    assert deployment.lines(database=tmp_path / "none.db")["registry"][0] == "ok"


def test_findings_of_the_audit_are_reported(deployment: Deployment) -> None:
    counts = {"untrue": 2, "decision_checks_violation": 1}
    told = Sample(at_ms=now_ms(), process="two", role="worker", seconds=10.0, counts=counts)
    deployment.execute(
        "INSERT INTO samples (at_ms, process, body) VALUES (?, 'two', ?)",
        told.at_ms,
        msgspec.json.encode(told).decode(),
    )
    state, text = deployment.lines()["audit"]
    assert state == "bad"
    assert "2 wrong values in the cache" in text
    assert "1 decision with a wrong profile" in text
    deployment.execute("UPDATE samples SET at_ms = ?", now_ms() - 3_601_000)
    assert deployment.lines()["audit"][0] == "ok"


def test_full_check_finds_damaged_evidence(deployment: Deployment) -> None:
    for user_id, spec, packed, decisions in (
        ("well", SPEC_V1, SufficientStatistics.none(SPEC_V1).pack(), 0),
        ("grown", SPEC_V2, SufficientStatistics.none(SPEC_V2).pack(), 0),
        ("cut short", SPEC_V1, b"", 1),
        ("minus", SPEC_V2, struct.pack("<d", -1) + SufficientStatistics.none(SPEC_V2).pack()[8:], 1),
    ):
        row = (user_id, spec.hash, packed, decisions)
        deployment.execute("INSERT INTO bandit_states VALUES (?, ?, ?, ?, 0, NULL, NULL)", *row)
    assert deployment.lines()["evidence"][0] == "ok"
    assert deployment.lines("--full")["evidence"] == ("bad", "users whose sufficient statistics are damaged: 2")


@pytest.mark.slow
def test_missing_or_foreign_database_is_named(deployment: Deployment, tmp_path: Path) -> None:
    assert "there is no database" in deployment.lines(database=tmp_path / "nowhere/none.db")["database"][1]
    other = tmp_path / "photo.jpg"
    other.write_bytes(b"\xff\xd8" * 4_000)
    assert deployment.lines(database=other)["database"][0] == "bad"
    assert "Run `profiles migrate`" in deployment.look(database=tmp_path / "none.db").out
    assert "keep a copy of the file, and restore a backup" in deployment.look(database=other).out


def test_damaged_database_is_named(deployment: Deployment) -> None:
    deployment.execute(
        "INSERT INTO event_log (event_id, subject, user_id, digest, occurred_at_ms, received_at_ms) "
        "VALUES ('e', 'signals.tip.served', 'u', x'00', 0, 0)"
    )
    assert deployment.lines()["integrity"] == ("bad", "it is damaged: event 1 has no fact")
    assert deployment.lines("--full")["integrity"] == ("bad", "it is damaged: event 1 has no fact")


def test_hard_link_is_named(deployment: Deployment, tmp_path: Path) -> None:
    (tmp_path / "second.db").hardlink_to(deployment.database)
    state, text = deployment.lines()["rights"]
    assert state == "bad"
    assert "2 names (hard links)" in text


def test_world_writable_database_is_named(deployment: Deployment) -> None:
    deployment.database.chmod(deployment.database.stat().st_mode | stat.S_IWOTH)
    assert deployment.lines()["rights"][0] == "bad"


@pytest.mark.slow
@pytest.mark.parametrize(("mebibytes", "state"), [(16, "ok"), (65, "warn"), (1025, "bad")])
def test_large_wal_is_named(deployment: Deployment, mebibytes: int, state: str) -> None:
    wal = deployment.database.with_name("profiles.db-wal")
    with closing(sqlite3.connect(deployment.database)) as connection:
        connection.execute("SELECT * FROM samples").fetchall()  # so that the log stays while it is open
        os.truncate(wal, mebibytes * 2**20)  # a hole: it takes no room
        assert deployment.lines()["wal"][0] == state
        os.truncate(wal, 0)


MOUNTS = """\
22 1 0:20 / / rw,relatime - ext4 /dev/root rw
30 22 0:30 / {place} rw,relatime shared:1 - {kind} server:/export rw
31 22 0:31 / /somewhere\\040else rw - nfs4 server:/other rw
"""


def test_file_system_is_judged_by_its_mount(tmp_path: Path) -> None:
    mounts, place = tmp_path / "mountinfo", tmp_path / "var"
    for state, kinds in {
        "ok": "ext4 xfs btrfs zfs fuse.mergerfs",
        "bad": "nfs nfs4 cifs 9p fuse.sshfs lustre",
        "warn": "tmpfs overlay",
    }.items():
        for kind in kinds.split():
            mounts.write_text(MOUNTS.format(place=place, kind=kind))
            assert diagnose_file_system(place, mounts).state == state, kind


def test_memory_file_system_is_named(deployment: Deployment, tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small") as small:
        if small is None:
            pytest.skip("only root may mount a file system")
        lines = deployment.lines(database=small.directory / "profiles.db")
        assert lines["file system"][0] == "warn"
        assert lines["file system"][1].startswith("the database lies in memory")
        assert lines["disk space"][0] == "bad"


@contextmanager
def open_files(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "state"), [(4_096, "ok"), (1_024, "warn"), (200, "bad")])
def test_low_limit_of_open_files_is_named(deployment: Deployment, limit: int, state: str) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < limit:
        pytest.skip("this user may not open so many")
    with open_files(limit):
        assert deployment.lines()["open files"][0] == state


# --- keys


@pytest.mark.slow
def test_keys_are_missing_or_lack_an_admin(deployment: Deployment) -> None:
    assert deployment.lines(api_keys="")["keys"][0] == "warn"
    assert deployment.lines(api_keys="", host="0.0.0.0")["keys"][0] == "bad"  # noqa: S104  # nothing listens
    reader = STRONG.replace("admin", "read")
    assert deployment.lines(api_keys=reader)["keys"] == (
        "warn",
        "none has the scope admin, so no admin can sign in to the pages",
    )


@pytest.mark.slow
def test_weak_key_is_named_but_not_shown(deployment: Deployment) -> None:
    for key in ("", "secret", "SECRET", "Admin", "123456", "ops"):
        weak = f"ops:admin:{hash_key(key).hex()},strong:read:{hash_key('pk_Xw8rT1zQm5').hex()}"
        state, text = deployment.lines(api_keys=weak)["weak keys"]
        assert (state, "key ops" in text) == ("bad", True), key
        assert key in ("", "ops") or key not in text


@pytest.mark.slow
def test_pruning_that_needs_confirmation_is_named(deployment: Deployment) -> None:
    old_ms = now_ms() - 200 * DAY_MS
    deployment.execute(
        "INSERT INTO event_log (event_id, subject, user_id, digest, occurred_at_ms, received_at_ms) "
        "VALUES ('e', 'signals.tip.served', 'u', x'00', ?, ?)",
        *(old_ms, old_ms),
    )
    state, text = deployment.lines()["retention"]
    assert (state, "Old events are not deleted" in text) == ("warn", True)
    assert deployment.lines(retention_days=300)["retention"][0] == "ok"
    deployment.execute("INSERT INTO service (name, value) VALUES ('pruned events', '0')")  # after the first run
    assert deployment.lines()["retention"][0] == "ok"


def test_worker_of_the_named_queue_is_checked(deployment: Deployment) -> None:
    assert deployment.lines(queue_name="other")["worker"][0] == "bad"
    ask(deployment.queue, "SET", "other" + HEALTH_SUFFIX, "alive")
    assert deployment.lines(queue_name="other")["worker"][0] == "ok"
