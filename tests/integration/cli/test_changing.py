"""`events`, `rebuild`, `demo`, `prune`, `keys`: with and without a running service; a bad line is named."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest

from app.cli.demo_set import HABITS, generate
from app.errors import Undecodable
from app.events.validation import decode_lines
from app.features.clock import DAY_MS, to_ms
from app.features.events import TipFeedback, TipServed
from app.settings import Settings
from app.stores.sqlite.database import SqliteDatabase
from app.stores.sqlite.event_log import SqliteEventLog
from app.stores.valkey.embedded import EmbeddedServer
from tests.integration.cli.conftest import Run
from tests.support.clock import NOW_MS
from tests.support.events import admitted, payload, served
from tests.support.live import live
from tests.support.processes import environment_of, interruptible
from tests.support.registry import REGISTRY, own_entry, own_registry
from tests.support.servers import ask, keys
from tests.support.traffic import now_ms
from tests.support.waiting import PATIENCE_S, eventually_sync

MOMENT_MS = now_ms()  # one for all lines: the same line twice is a duplicate
RECEIPT = {"accepted": 0, "duplicates": 0, "refused": 0}


def line(event_id: str, **changes: Any) -> str:
    return json.dumps(payload(served("ann", MOMENT_MS, event_id=event_id), **changes))


def stored(tmp_path: Path) -> list[str]:
    """Ids of the events in the default database."""
    with closing(sqlite3.connect(tmp_path / "var/profiles.db")) as connection:
        return [event_id for (event_id,) in connection.execute("SELECT event_id FROM event_log ORDER BY seq")]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are loaded three lines at a time."""
    monkeypatch.setattr("app.cli.events.LINES_PER_REQUEST", 3)


# --- events


@pytest.mark.slow
def test_events_are_loaded_once_when_the_file_is_loaded_again(
    migrated: Run, tmp_path: Path, small_pieces: None
) -> None:
    (tmp_path / "events").write_text("\n".join([line("a"), "", line("b"), line("c"), "", "", "", line("d")]))
    first = migrated("events", "events")
    assert (first.code, first.out) == (0, "4 events stored, 0 duplicates, 0 refused\n")
    assert migrated("events", "events", "--json").json == {**RECEIPT, "duplicates": 4}
    assert stored(tmp_path) == ["a", "b", "c", "d"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 5 is not valid JSON"),
        ('{"subject": "x"}', "line 5.subject: unknown subject 'x'"),
        (line("e", user_id="a/b"), "line 5.user_id: must not contain /"),
        (line("e", colour="red"), "line 5.colour: unknown field"),
        (line("e", occurred_at="2999-01-01T00:00:00Z"), "line 5.occurred_at: more than five minutes ahead"),
        (line("a", tip_id="another"), "line 5.event_id: 'a' is known with other content"),
    ],
)
def test_loading_stops_at_the_first_bad_line(
    migrated: Run, tmp_path: Path, small_pieces: None, bad: str, message: str
) -> None:
    lines = [line("a"), line("b"), line("c"), line("d"), bad, line("f"), line("g")]
    (tmp_path / "events").write_text("\n".join(lines))
    shown = migrated("events", "events", "--json")
    assert shown.code == 5
    assert message in shown.err
    assert "stopped: the first 3 lines are stored" in shown.err
    assert shown.json == {"accepted": 3, "duplicates": 0, "refused": 1}
    assert stored(tmp_path) == ["a", "b", "c"]


@pytest.mark.slow
def test_rest_is_loaded_when_bad_lines_are_skipped(migrated: Run, tmp_path: Path, small_pieces: None) -> None:
    lines = [
        line("a"),
        "nonsense",
        line("c"),
        line("d", user_id=""),
        line("c"),
        line("a", tip_id="another"),
        line("g", occurred_at="2999-01-01T00:00:00Z"),
        "",
        line("i"),
    ]
    (tmp_path / "events").write_text("\n".join(lines))
    shown = migrated("events", "events", "--skip-bad", "--json")
    assert shown.code == 1
    assert shown.json == {"accepted": 3, "duplicates": 1, "refused": 4}
    assert re.findall(r"^  (line \d+[^:]*):", shown.err, re.MULTILINE) == [
        "line 2",
        "line 4.user_id",
        "line 6.event_id",
        "line 7.occurred_at",
    ]
    assert stored(tmp_path) == ["a", "c", "i"]


def test_bytes_that_are_no_text_are_escaped(migrated: Run, tmp_path: Path) -> None:
    (tmp_path / "events").write_bytes(line("a").encode() + b"\n\xff\xfe\n" + line("b", tip_id="\x1b[31m").encode())
    shown = migrated("events", "events", "--skip-bad")
    assert shown.code == 1
    assert "line 2" in shown.err
    assert "line 3.tip_id: must not contain the character U+001B" in shown.err
    assert "\x1b" not in shown.err


@pytest.mark.slow
def test_byte_order_mark_and_line_ends_of_windows_are_accepted(migrated: Run, tmp_path: Path) -> None:
    (tmp_path / "events").write_bytes(f"\ufeff{line('a')}\r\n{line('b')}\r\n".encode())
    for arguments in ((), ("--skip-bad",)):
        assert migrated("events", "events", *arguments).code == 0
    (tmp_path / "events").write_bytes(f"\ufeff{line('c')}\r\nbad\r\n{line('d')}\r\n".encode())
    assert migrated("events", "events", "--skip-bad").code == 1
    assert stored(tmp_path) == ["a", "b", "c", "d"]


OTHER_FORMATS = {
    "a JSON array": [f"[{line('a')}]".encode()],
    "one JSON document over several lines": [json.dumps(json.loads(line("a")), indent=2).encode()],
    "a table of columns": [b"event_id,user_id,tip_id\na,ann,t\n"],
    "gzip": [gzip.compress(line("a").encode())],
    "text in UTF-16": [line("a").encode("utf-16"), line("a").encode("utf-16-be")],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_other_format_is_named(migrated: Run, tmp_path: Path, name: str) -> None:
    for content in OTHER_FORMATS[name]:
        (tmp_path / "events").write_bytes(content)
        for more in ([], ["--skip-bad"]):
            shown = migrated("events", "events", *more)
            assert shown.code == 5
            assert f"events is {name}; send newline-delimited JSON in UTF-8, one event per line" in shown.err
        with pytest.raises(Undecodable, match=f"the body is {name}; send newline-delimited JSON"):
            decode_lines(content)
    assert stored(tmp_path) == []


def test_file_is_named_when_it_does_not_exist(migrated: Run) -> None:
    shown = migrated("events", "missing")
    assert (shown.code, "'missing' does not exist" in shown.err) == (2, True)


def test_nothing_is_loaded_when_there_is_no_database(profiles: Run, tmp_path: Path) -> None:
    (tmp_path / "events").write_text(line("a"))
    assert profiles("events", "events").code == 4


# --- rebuild


@pytest.fixture
def populated(migrated: Run, tmp_path: Path) -> Run:
    """Five users of today, and one of long ago."""
    users = [f"user-{number}" for number in range(5)]
    lines = [line(user, user_id=user) for user in users]
    old = payload(served("old", now_ms() - 40 * DAY_MS, event_id="old"))
    (tmp_path / "events").write_text("\n".join([*lines, json.dumps(old)]))
    assert migrated("events", "events").code == 0
    return migrated


@pytest.mark.slow
def test_rebuild_fills_the_cache(populated: Run, own_valkey: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.cli.profiles.REBUILT_AT_ONCE", 2)
    server = {"cache_url": own_valkey.url}
    shown = populated("rebuild", "user-1", "user-2", "user-1", **server)
    assert (shown.code, shown.out) == (0, "2 users rebuilt\n")
    assert len(keys(own_valkey)) == 2 * len(REGISTRY)

    assert populated("rebuild", "--all", "--json", "--feature", "tip_volume_30d", **server).json == {
        "rebuilt": 5,
        "failed": {},
    }
    assert len(keys(own_valkey)) == 2 * len(REGISTRY) + 3
    assert '"cache"' not in populated("profile", "user-1", "--json", **server).out
    assert " cache " in populated("profile", "user-1", **server).out


def test_rebuild_names_the_cache_that_fails(populated: Run, own_valkey: EmbeddedServer) -> None:
    ask(own_valkey, "REPLICAOF", "127.0.0.1", "1")
    for url, reason in ((own_valkey.url, "READONLY"), ("redis://127.0.0.1:1/0", "ConnectionError")):
        for users in ("user-1", "--all"):
            shown = populated("rebuild", users, cache_url=url)
            assert (shown.code, f"the cache cannot be used: {reason}" in shown.err) == (4, True), shown.err


@pytest.mark.slow
def test_rebuild_fills_values_of_the_named_registry(populated: Run, own_valkey: EmbeddedServer, tmp_path: Path) -> None:
    server = {"cache_url": own_valkey.url}
    new = own_registry(tmp_path / "new.py", own_entry("brand_new", days=60))
    shown = populated("rebuild", "--all", "--feature", "brand_new", "--registry", new, **server)
    assert (shown.code, shown.out) == (0, "6 users rebuilt\n")  # an event of 40 days ago is within its window
    assert len([key for key in keys(own_valkey) if b"brand_new" in key]) == len(keys(own_valkey)) == 6
    assert " cache " in populated("profile", "old", features=new, **server).out
    with closing(sqlite3.connect(tmp_path / "var/profiles.db")) as connection:
        announced = connection.execute("SELECT subject FROM feature_keys WHERE feature = 'brand_new'").fetchall()
    assert announced == [("signals.tip.served",)]  # whichever process takes such an event deletes the key
    unknown = populated("rebuild", "--all", "--feature", "brand_new", **server)
    assert (unknown.code, "unknown feature 'brand_new'" in unknown.err) == (5, True)


@pytest.mark.slow
def test_rebuild_keeps_to_the_rate(populated: Run, own_valkey: EmbeddedServer) -> None:
    server = {"cache_url": own_valkey.url}
    took = []
    for rate in ("0", "2"):
        started = monotonic()
        assert populated("rebuild", "--all", "--rate", rate, **server).out == "5 users rebuilt\n"
        took.append(monotonic() - started)
    assert took[1] >= 4 / 2  # two at a time, the last after four


@pytest.mark.slow
def test_rebuild_counts_values_that_fail(populated: Run, own_valkey: EmbeddedServer, tmp_path: Path) -> None:
    sql = "SELECT user_id, 0.5 AS value FROM views GROUP BY user_id"
    new = own_registry(tmp_path / "new.py", own_entry("sound"), own_entry("faulty", sql))
    server = {"features": new, "cache_url": own_valkey.url}
    shown = populated("rebuild", "user-1", "user-2", **server)
    reason = "the SQL gave float 0.5 where int is declared"
    assert (shown.code, shown.out) == (1, f"2 users rebuilt\n  faulty failed: {reason}\n")
    assert populated("rebuild", "user-1", "--json", **server).json == {"rebuilt": 1, "failed": {"faulty": reason}}


def test_rebuild_is_refused_when_an_argument_is_wrong(migrated: Run) -> None:
    for command, code, message in [
        ("ann --rate -1", 2, "Invalid value for '--rate'"),
        ("ann --registry new.py", 2, "'--registry': must be package.module:NAME or /path/features.py:NAME"),
        ("ann --registry new.py:X", 2, "--registry: cannot load new.py: No such file or directory"),
        ("", 2, "give either USERS or --all"),
        ("ann --all", 2, "give either USERS or --all"),
        ("a/b", 5, "user_id: must not contain /"),
        ("ann --feature shoe_size", 5, "unknown feature 'shoe_size'; known are completion_rate_30d"),
        ("ann", 4, "no cache is set (PROFILES_CACHE_URL)"),
    ]:
        shown = migrated("rebuild", *command.split())
        assert (shown.code, message in shown.err) == (code, True), (command, shown.err)


def test_rebuild_fails_when_the_cache_is_unreachable(populated: Run) -> None:
    shown = populated("rebuild", "--all", cache_url="unix:///nowhere/cache.sock")
    assert (shown.code, shown.out) == (4, "")


def test_rebuild_fails_when_the_cache_refuses_writes(populated: Run, own_valkey: EmbeddedServer) -> None:
    ask(own_valkey, "REPLICAOF", "127.0.0.1", 1)
    shown = populated("rebuild", "--all", cache_url=own_valkey.url)
    assert (shown.code, shown.out) == (4, "")
    assert "read only replica" in shown.err


# --- beside a running `profiles up`


@pytest.mark.slow
def test_commands_find_the_servers_of_a_running_up(populated: Run, tmp_path: Path, own_valkey: EmbeddedServer) -> None:
    announced = tmp_path / "var" / "run" / "servers.json"
    announced.parent.mkdir()
    where = {"pid": os.getpid(), "cache_url": own_valkey.url, "queue_url": own_valkey.url}
    announced.write_text(json.dumps(where))
    assert populated("rebuild", "user-1").code == 0
    (tmp_path / "more").write_text(line("more"))
    assert populated("events", "more").code == 0
    assert ask(own_valkey, "ZCARD", "arq:queue") == 1  # the job for a worker


def test_commands_ignore_a_useless_announcement(migrated: Run, tmp_path: Path) -> None:
    announced = tmp_path / "var" / "run" / "servers.json"
    announced.parent.mkdir()
    for text in ("", "nonsense", "[]", '{"pid": 0}', '{"pid": 999999999, "cache_url": "", "queue_url": ""}'):
        announced.write_text(text)
        assert migrated("profile", "user-1").code == 0, text


# --- demo


def test_demo_set_is_the_same_on_the_same_day() -> None:
    first = list(generate(users=40, days=30, seed=1, now_ms=NOW_MS))
    assert first == list(generate(users=40, days=30, seed=1, now_ms=NOW_MS + DAY_MS // 2 - 1))
    assert first != list(generate(users=40, days=30, seed=2, now_ms=NOW_MS))
    ids = [event.event_id for event in first]
    assert len(ids) == len(set(ids))
    assert not set(ids) & {event.event_id for event in generate(users=40, days=30, seed=1, now_ms=NOW_MS + DAY_MS)}
    assert all(NOW_MS - 32 * DAY_MS <= to_ms(event.occurred_at) < NOW_MS for event in first)


def test_demo_users_have_different_habits() -> None:
    completed: dict[str, list[bool]] = {}
    tips: dict[str, int] = {}
    for event in generate(users=300, days=60, seed=1, now_ms=NOW_MS):
        if isinstance(event, TipServed):
            tips[event.user_id] = tips.get(event.user_id, 0) + 1
        elif isinstance(event, TipFeedback):
            completed.setdefault(event.user_id, []).append(event.action == "completed")
    rates = [sum(one) / len(one) for one in completed.values() if len(one) >= 10]
    assert sum(rate > 0.7 for rate in rates) > 30, "no finishers"
    assert sum(rate < 0.2 for rate in rates) > 30, "no dismissers"
    assert min(tips.values()) < 5
    assert max(tips.values()) > 30
    assert len(HABITS) >= 5


@pytest.mark.slow
def test_demo_set_is_stored_once_when_loaded_twice(migrated: Run) -> None:
    first = migrated("demo", "--users", "30", "--days", "40")
    assert first.code == 0
    assert not first.out.startswith("0 ")
    assert migrated("demo", "--users", "30", "--days", "40").out.startswith("0 events stored ")
    rates, hours, volumes = set(), set(), set()
    for number in range(1, 31):
        features = migrated("profile", f"user-{number:04d}", "--json").json["features"]
        rates.add(features["completion_rate_30d"])
        hours.add(features["preferred_hour"])
        volumes.add(features["tip_volume_30d"])
    assert min(len(rates), len(hours), len(volumes)) >= 8


def test_demo_is_refused_when_a_number_is_wrong(migrated: Run) -> None:
    for arguments in (["--users", "0"], ["--days", "151"], ["--seed", "x"]):
        assert migrated("demo", *arguments).code == 2, arguments


# --- prune


@pytest.mark.slow
def test_old_events_are_deleted_when_confirmed(migrated: Run, tmp_path: Path) -> None:
    old_ms = now_ms() - 200 * DAY_MS
    database = tmp_path / "var/profiles.db"

    async def store() -> None:
        opened = await SqliteDatabase.open(database, readers=1)
        await SqliteEventLog(opened).append([[admitted(served("ann", moment)) for moment in (old_ms, now_ms())]])
        await opened.close()

    asyncio.run(store())
    for _ in range(2):
        shown = migrated("prune")
        assert (shown.code, shown.out) == (
            1,
            "0 decisions deleted\nevents not deleted: more than three days; check the clock, then use --confirm\n",
        )
    assert migrated("prune", "--confirm").out == "1 events deleted\n0 decisions deleted\n"
    shown = migrated("prune")
    assert (shown.code, shown.out) == (0, "0 events deleted\n0 decisions deleted\n")
    assert json.loads(migrated("profile", "ann", "--json").out)["features"]["tip_volume_30d"] == 1
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT action, outcome FROM audit_trail ORDER BY id").fetchall()
    assert ("prune everything too old", "1 events, 0 decisions") in rows


# --- keys


def test_new_key_is_accepted_by_the_service(migrated: Run, tmp_path: Path) -> None:
    made = migrated("keys", "new", "recommender", "--scope", "read", "--scope", "write", "--json").json
    assert made["entry"].startswith("recommender:read+write:")
    assert made["key"] not in made["entry"]
    settings = Settings.from_environment({"PROFILES_API_KEYS": made["entry"], "PROFILES_DATABASE": "var/profiles.db"})

    async def statuses() -> list[int]:
        async with live(settings) as site:
            asked: list[httpx.Response] = [
                await site.client.get("/profiles/ann", headers={"X-API-Key": made["key"]}),
                await site.client.get("/admin/dead-letters", headers={"X-API-Key": made["key"]}),
                await site.client.get("/profiles/ann", headers={"X-API-Key": made["key"] + "x"}),
                await site.client.get("/profiles/ann"),
            ]
            return [answer.status_code for answer in asked]

    assert asyncio.run(statuses()) == [200, 403, 401, 401]


def test_new_key_is_shown_with_its_entry(profiles: Run) -> None:
    shown = profiles("keys", "new", "ops", "--scope", "admin")
    assert shown.code == 0
    assert re.search(r"^key \(not shown again\):  pk_[\w-]{43}$", shown.out, re.MULTILINE)
    assert re.search(r"^PROFILES_API_KEYS: +ops:admin:[0-9a-f]{64}$", shown.out, re.MULTILINE)
    assert shown.out != profiles("keys", "new", "ops", "--scope", "admin").out


def test_key_is_refused_when_its_name_or_scope_is_not_allowed(profiles: Run) -> None:
    for arguments in (["a:b"], ["a", "--scope", "root"], [""]):
        assert profiles("keys", "new", *arguments).code == 2, arguments


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["backup", "copy.db"], "copy.db.part"),
        (["restore", "--yes", "copy.db"], "var/profiles.db.restoring"),
    ],
    ids=["backup", "restore"],
)
def test_no_partial_copy_is_left_when_backup_is_stopped(
    migrated: Run, tmp_path: Path, arguments: list[str], part: str
) -> None:
    with closing(sqlite3.connect(tmp_path / "var/profiles.db")) as connection:
        connection.execute("CREATE TABLE filling (block BLOB)")
        connection.executemany("INSERT INTO filling VALUES (zeroblob(?))", [(2**20,)] * 150)
        connection.commit()
    if arguments[0] == "restore":
        shutil.copyfile(tmp_path / "var/profiles.db", "copy.db")
    before = {path for path in tmp_path.rglob("*") if path.suffix not in (".db-wal", ".db-shm")}
    command = [sys.executable, "-m", "app", *arguments]
    with interruptible(command, cwd=tmp_path, env=environment_of(), stderr=subprocess.PIPE, text=True) as running:
        eventually_sync(lambda: (tmp_path / part).exists() and (tmp_path / part).stat().st_size > 0)
        running.terminate()
        _, told = running.communicate(timeout=PATIENCE_S)
    assert (running.returncode, "Traceback" in told) == (143, False), told
    assert {path for path in tmp_path.rglob("*") if path.suffix not in (".db-wal", ".db-shm")} == before
