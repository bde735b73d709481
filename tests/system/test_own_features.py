"""Features of one's own in running processes: filled before they are served, switched off, and failing.

The processes serve registries in files, as operators write them, and commands run beside them.
"""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from tests.support.events import feedback, payload, served
from tests.support.fleet import Fleet, counted
from tests.support.http import Connection, serving
from tests.support.processes import Program, Programs, free_port
from tests.support.registry import own_entry, own_registry
from tests.support.servers import keys
from tests.support.traffic import now_ms
from tests.support.waiting import eventually_async

pytestmark = pytest.mark.slow

DEADLINE_MS = 1_000
# Endless for a user with more than three reactions, which no stored user may have when the process starts.
ENDLESS = """
    WITH RECURSIVE n(i) AS (
        SELECT 1
        UNION ALL
        SELECT i + 1 FROM n WHERE i < (SELECT CASE WHEN COUNT(*) > 3 THEN 9e15 ELSE 3 END FROM feedback)
    )
    SELECT user_id, (SELECT COUNT(*) FROM n) AS value FROM feedback GROUP BY user_id
"""


def run(programs: Programs, fleet: Fleet, *arguments: str, **settings: Any) -> Program:
    """A command beside the fleet, to its end."""
    program = programs.start(*arguments, database=fleet.database, cache_url=fleet.cache.url, **settings)
    assert program.wait() == 0, program.output
    return program


async def send(connection: Connection, *events: Any) -> None:
    answer = await connection.post("/events", [payload(event) for event in events])
    assert answer.status == 202, answer


async def detail(connection: Connection, user_id: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = (await connection.get(f"/profiles/{user_id}?detail=true")).json["features"]
    return found


def users_with(fleet: Fleet, feature: bytes) -> set[bytes]:
    """The users of whom the cache has this feature."""
    return {user for user in (b"ann", b"bob") for key in keys(fleet.cache) if feature in key and user in key}


async def test_new_feature_is_filled_before_processes_start(fleet: Fleet, programs: Programs, tmp_path: Path) -> None:
    (old,) = await fleet.apis(1)
    connection = Connection(old.port)
    await send(connection, served("ann", now_ms()), served("bob", now_ms()), served("bob", now_ms()))
    new = own_registry(tmp_path / "new.py", own_entry("brand_new"))

    filled = run(programs, fleet, "rebuild", "--all", "--feature", "brand_new", "--registry", new)
    assert filled.output == "2 users rebuilt\n"
    assert users_with(fleet, b"brand_new") == {b"ann", b"bob"}

    plan = programs.start("features", "plan", "--registry", new, database=fleet.database)
    assert plan.wait() == 1
    assert "feature brand_new, change added" in plan.output
    assert "feature tip_volume_30d, change removed, details none, breaks yes" in plan.output

    await send(connection, served("ann", now_ms()))  # taken by a process that does not know the feature
    assert users_with(fleet, b"brand_new") == {b"bob"}
    await connection.close()

    (started,) = await fleet.apis(1, features=new)
    connection = Connection(started.port)
    found = [(await detail(connection, user_id))["brand_new"] for user_id in ("bob", "ann")]
    await connection.close()
    assert [(item["value"], item["origin"]) for item in found] == [(2, "cache"), (2, "computed")]


async def test_disabled_feature_is_null_in_a_running_process(fleet: Fleet, programs: Programs) -> None:
    (api,) = await fleet.apis(1)
    connection = Connection(api.port)
    await send(connection, served("ann", now_ms()), served("ann", now_ms()))

    async def volume() -> object:
        return (await connection.get("/profiles/ann")).json["features"]["tip_volume_30d"]

    async def near() -> bool:
        assert await volume() == 2
        return await counted(api.port, "near_hits_total") > 0

    async def is_null() -> bool:
        return await volume() is None

    await eventually_async(near)
    assert (await detail(connection, "bob"))["tip_volume_30d"]["value"] == 0
    run(programs, fleet, "features", "disable", "tip_volume_30d", "--reason", "counts twice")
    await eventually_async(is_null)

    found = (await detail(connection, "ann"))["tip_volume_30d"]
    assert found["value"] is None
    assert found["error"].startswith("disabled by the command line at ")
    assert found["error"].endswith(": counts twice")
    batch = await connection.post("/profiles/batch", {"user_ids": ["ann", "bob"]})
    assert [item["features"]["tip_volume_30d"] for item in batch.json["profiles"]] == [None, None]
    candidate = {"id": "t", "features": {"is_overdue": False, "task_age_days": 1, "priority": 1}}
    scored = await connection.post("/score", {"user_id": "ann", "candidates": [candidate]})
    decision = await connection.get(f"/decisions/{scored.json['decision_id']}")
    assert decision.json["profile"]["features"]["tip_volume_30d"] is None

    await send(connection, served("bob", now_ms()))
    run(programs, fleet, "features", "enable", "tip_volume_30d")

    async def is_back() -> bool:
        return await volume() == 2

    await eventually_async(is_back)
    assert (await detail(connection, "ann"))["tip_volume_30d"]["origin"] == "cache"
    assert (await detail(connection, "bob"))["tip_volume_30d"]["value"] == 1
    await connection.close()
    assert [action for (action,) in fleet.rows("SELECT action FROM audit_trail ORDER BY id")] == [
        "disable feature",
        "enable feature",
    ]


class Watch:
    """Asks a process over and over, on a connection of its own, and counts how many answers took the deadline."""

    def __init__(self, port: int, path: str) -> None:
        self._connection = Connection(port)
        self._path = path
        self._over = False
        self._task = asyncio.get_running_loop().create_task(self._run())
        self.slow = 0
        self.answers = 0

    async def _run(self) -> None:
        while not self._over:
            answer = await self._connection.get(self._path)
            assert answer.status == 200, answer
            self.slow += answer.seconds >= DEADLINE_MS / 1000
            self.answers += 1

    async def end(self) -> None:
        self._over = True
        await self._task
        await self._connection.close()
        assert self.answers


async def test_feature_that_becomes_endless_delays_nothing_else(fleet: Fleet, tmp_path: Path) -> None:
    registry = own_registry(tmp_path / "own.py", own_entry("sound"), own_entry("endless", ENDLESS))
    settings = {"features": registry, "statement_timeout_ms": DEADLINE_MS, "near_users": 0, "log_format": "json"}
    (api,) = await fleet.apis(1, **settings)
    connection = Connection(api.port)
    await send(connection, *(feedback("good", now_ms()) for _ in range(3)), served("good", now_ms()))
    await send(connection, *(feedback("bad", now_ms()) for _ in range(4)), served("bad", now_ms()))
    assert (await detail(connection, "good"))["endless"]["value"] == 3

    began = monotonic()
    watch = Watch(api.port, "/readyz")
    found = await connection.get("/profiles/bad?detail=true")
    assert watch.answers > 3, "they waited for the endless statement"
    await watch.end()
    assert found.json["features"]["sound"]["value"] == 1
    assert found.json["features"]["endless"]["value"] is None
    reason = f"the SQL took longer than {DEADLINE_MS:,} ms for one user"
    assert found.json["features"]["endless"]["error"] == reason
    assert found.seconds > DEADLINE_MS / 1000

    def pauses() -> int:
        return api.program.output.count('"feature_paused"')

    # Attempts go on in the background meanwhile, each for as long as the deadline.
    watches = [Watch(api.port, path) for path in ("/readyz", "/profiles/unknown", "/profiles/bad?features=sound")]
    assert (await detail(connection, "bad"))["endless"]["error"] == reason

    async def tried_again() -> bool:
        await send(connection, served("unknown", now_ms()))
        return pauses() >= 3

    await eventually_async(tried_again)
    assert monotonic() - began > 1 + 2  # seconds of pauses, each twice as long as the one before
    for watch in watches:
        await watch.end()
        assert watch.slow < 2, "they waited for both attempts"

    ready = (await connection.get("/readyz")).json
    assert ready["status"] == "degraded"
    assert ready["checks"]["features"].startswith(f"failing, and answered as null: endless: {reason}, since ")
    await connection.close()
    assert api.program.stop(signal.SIGTERM) == 0
    assert "requests_cut_short" not in api.program.output


async def test_process_stops_while_an_endless_statement_runs(fleet: Fleet, tmp_path: Path) -> None:
    registry = own_registry(tmp_path / "own.py", own_entry("endless", ENDLESS))
    (api,) = await fleet.apis(1, features=registry, statement_timeout_ms=600_000)
    connection = Connection(api.port)
    await send(connection, *(feedback("bad", now_ms()) for _ in range(4)))
    reading = asyncio.get_running_loop().create_task(connection.get("/profiles/bad"))
    watch = Watch(api.port, "/readyz")
    await eventually_async(lambda: _true_after(watch, 20))
    await watch.end()
    api.program.send(signal.SIGTERM)
    await asyncio.gather(reading, return_exceptions=True)
    assert await asyncio.to_thread(api.program.wait) == 0
    await connection.close()


async def _true_after(watch: Watch, answers: int) -> bool:
    return watch.answers >= answers


async def test_endless_new_feature_refuses_to_start(fleet: Fleet, programs: Programs, tmp_path: Path) -> None:
    registry = own_registry(tmp_path / "own.py", own_entry("sound"), own_entry("endless", ENDLESS))
    settings: dict[str, Any] = {"features": registry, "statement_timeout_ms": DEADLINE_MS}
    (api,) = await fleet.apis(1, **settings)  # no user is stored: it starts, and has been served
    connection = Connection(api.port)
    await send(connection, *(feedback("bad", now_ms()) for _ in range(4)), served("bad", now_ms()))
    await connection.close()
    assert api.program.stop() == 0

    reason = f"the SQL took longer than {DEADLINE_MS:,} ms for one user"
    again = fleet.api(**settings)
    await serving(again.port)
    connection = Connection(again.port)
    ready = (await connection.get("/readyz")).json
    assert ready["checks"]["features"].startswith(f"failing, and answered as null: endless: {reason}")
    found = await detail(connection, "bad")
    await connection.close()
    assert (found["sound"]["value"], found["endless"]["error"]) == (1, reason)
    assert "feature_paused" in again.program.output
    assert again.program.stop() == 0

    changed = own_registry(tmp_path / "new.py", own_entry("sound"), own_entry("endless", ENDLESS, days=31))
    for arguments in (["serve"], ["worker"]):
        refused = programs.start(
            *arguments,
            **{**settings, "features": changed},
            database=fleet.database,
            cache_url=fleet.cache.url,
            queue_url=fleet.queue.url,
            port=free_port(),  # 8000 may belong to a service that runs beside the tests
            worker_metrics_port=0,
        )
        assert refused.wait() == 2, refused.output
        assert f"error: feature 'endless': a trial with 1 stored users failed: {reason}" in refused.output
