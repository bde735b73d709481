"""`profiles up` in a fresh directory, seen by its three users, and with its processes killed one by one."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import pytest
import pytest_asyncio
from arq.connections import ArqRedis
from arq.constants import job_key_prefix

from app.stores.queue.client import QUEUE
from app.stores.queue.jobs import TIP_EVENTS
from tests.support.events import payload, served
from tests.support.http import Broken, Connection, serving
from tests.support.live import new_user
from tests.support.processes import Program, Programs, free_port
from tests.support.queue import connect
from tests.support.traffic import now_ms
from tests.support.waiting import eventually, eventually_async

pytestmark = pytest.mark.slow

CHILDREN = {"api": ("-m app serve",), "worker": ("-m app worker",), "cache": ("cache.sock",), "queue": ("queue.sock",)}


class Up(NamedTuple):
    program: Program
    port: int


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One for the module, in a fresh directory with an empty database. The cache has time, however busy the machine."""
    programs = Programs(tmp_path_factory.mktemp("up"))
    port = free_port()
    try:
        program = programs.start("up", port=port, worker_metrics_port=free_port(), demo=0, cache_timeout_ms=5_000)
        program.says("Up.")
        yield Up(program, port)
    finally:
        programs.close()


@pytest_asyncio.fixture
async def client(up: Up) -> AsyncIterator[Connection]:
    await serving(up.port)
    connection = Connection(up.port)
    yield connection
    await connection.close()


@pytest_asyncio.fixture
async def queue(up: Up) -> AsyncIterator[ArqRedis]:
    """What a program that publishes on the queue has in hand."""
    client = connect(f"unix://{up.program.directory}/var/run/queue.sock")
    yield client
    await client.aclose(close_connection_pool=True)


async def features(client: Connection, user: str) -> dict[str, Any]:
    answer = await client.get(f"/profiles/{user}")
    assert answer.status == 200, answer
    found: dict[str, Any] = answer.json["features"]
    return found


async def tips(client: Connection, user: str) -> int:
    """How many tips the profile says the user was served."""
    return int((await features(client, user))["tip_volume_30d"])


async def letters(client: Connection) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await client.get("/admin/dead-letters")).json["dead_letters"]
    return found


async def test_admin_rebuilds_and_measures(client: Connection) -> None:
    users = [new_user("admin") for _ in range(150)]
    await client.post("/events", [payload(served(user, now_ms()), event_id=user) for user in users])

    rebuilt = await client.post(f"/admin/users/{users[0]}/rebuild", {})
    assert rebuilt.status == 200
    assert rebuilt.json["features"]["tip_volume_30d"]["value"] == 1
    view = (await client.get(f"/admin/users/{users[0]}")).json
    assert view["features"]["tip_volume_30d"]["freshness"] == "fresh"
    assert [event["event"]["event_id"] for event in view["events"]] == [users[0]]

    started = await client.post("/admin/rebuilds", {"scope": "all"})
    assert started.status == 202, started
    run = f"/admin/rebuilds/{started.json['id']}"

    async def completed() -> bool:
        return bool((await client.get(run)).json["state"] == "completed")

    await eventually_async(completed)
    quality = (await client.get("/admin/data-quality")).json
    for name, figures in quality["features"].items():
        assert figures["eligible"] >= len(users)
        assert figures["fresh"] + figures["missing"] + figures["stale"] == figures["eligible"], name
        assert figures["stale"] == 0
    assert quality["features"]["tip_volume_30d"]["missing"] == 0


async def test_admin_finds_a_dead_letter(client: Connection, queue: ArqRedis) -> None:
    user = new_user()
    known = {letter["id"] for letter in await letters(client)}
    good = payload(served(user, now_ms()), event_id=user)
    await queue.enqueue_job(TIP_EVENTS, [good, {**good, "event_id": f"{user}-bad", "subject": "signals.tip.unknown"}])
    await queue.enqueue_job("no_job_of_ours", 1)
    pickled = pickle.dumps({"t": None, "f": TIP_EVENTS, "a": ([good],), "k": {}, "et": now_ms()})
    await queue.set(job_key_prefix + user, pickled)
    await queue.zadd(QUEUE, {user: now_ms()})

    async def buried() -> bool:
        return len([letter for letter in await letters(client) if letter["id"] not in known]) == 3

    await eventually_async(buried)
    errors = " ".join(letter["error"] for letter in await letters(client) if letter["id"] not in known)
    assert "unknown subject" in errors
    assert "no_job_of_ours" in errors
    assert "the job is a pickle" in errors
    assert await tips(client, user) == 1

    (bad,) = [one for one in await letters(client) if "unknown subject" in one["error"] and one["id"] not in known]
    assert (await client.post(f"/admin/dead-letters/{bad['id']}/replay", {})).status == 422
    assert (await client.delete(f"/admin/dead-letters/{bad['id']}")).status == 204


@pytest.mark.parametrize("name", ["api", "worker", "cache", "queue"])
async def test_killed_process_returns_and_nothing_is_lost(
    up: Up, client: Connection, queue: ArqRedis, name: str
) -> None:
    user = new_user(name)
    sent = 0

    async def send() -> None:
        nonlocal sent
        event = payload(served(user, now_ms()), event_id=f"{user}-{sent}")

        async def acknowledged() -> bool:
            try:
                return (await client.post("/events", event)).status == 202
            except Broken:
                return False

        await eventually_async(acknowledged)
        sent += 1
        assert await tips(client, user) == sent

    await send()
    killed = up.program.child(*CHILDREN[name])
    assert killed, up.program.family()
    os.kill(killed, signal.SIGKILL)
    for _ in range(5):
        await send()
    await eventually(lambda: up.program.child(*CHILDREN[name]) not in (0, killed))

    async def ready() -> bool:
        try:
            return bool((await client.get("/readyz")).json["status"] == "ready")
        except Broken:
            return False

    await eventually_async(ready)
    await send()
    await queue.enqueue_job(TIP_EVENTS, [payload(served(user, now_ms()), event_id=f"{user}-queued")])

    async def reflected() -> bool:
        return await tips(client, user) == sent + 1

    await eventually_async(reflected)
    assert up.program.running
