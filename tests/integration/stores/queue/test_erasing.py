"""Erasing a user from the queue takes the user's events, whatever else happens meanwhile, and nothing else."""

from __future__ import annotations

import asyncio
import itertools
from time import thread_time
from typing import Any

import pytest
from arq.connections import ArqRedis
from arq.constants import in_progress_key_prefix, job_key_prefix

from app.concurrency.tasks import end
from app.errors import QueueUnavailable
from app.stores.queue import client as module
from app.stores.queue import jobs as jobs_module
from app.stores.queue.client import QUEUE, Queue
from app.stores.queue.jobs import (
    BURY,
    CONSUME,
    PIECE_BYTES,
    TIP_EVENTS,
    deserialize,
    serialize,
    split,
    without_user,
)
from app.stores.valkey.embedded import EmbeddedServer
from app.telemetry import Metrics
from tests.support.proxy import proxy
from tests.support.servers import ask
from tests.support.waiting import eventually

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def events_of(*users: str, number: int) -> list[dict[str, Any]]:
    cycle = itertools.cycle(users)
    return [{"user_id": next(cycle), "event_id": f"event-{index}", "tip_id": "x" * 20} for index in range(number)]


LARGE = events_of("ann", "bob", number=12_000)


def job(*arguments: object, **changes: object) -> bytes:
    return serialize({"t": None, "f": TIP_EVENTS, "a": list(arguments), "k": {}, "et": 1, **changes})


def put(server: EmbeddedServer, **jobs: bytes) -> None:
    for job_id, raw in jobs.items():
        ask(server, "SET", job_key_prefix + job_id, raw)
        ask(server, "ZADD", QUEUE, 1, job_id)


async def waiting(client: ArqRedis) -> list[dict[str, Any]]:
    """The events of all jobs on the queue, in the order in which they were published."""
    raws = [await client.get(job_key_prefix + job_id.decode()) for job_id in await client.zrange(QUEUE, 0, -1)]
    found = [event for raw in raws if raw is not None for event in deserialize(raw)["a"][0]]
    return sorted(found, key=lambda event: int(event["event_id"].removeprefix("event-")))


@pytest.mark.slow
async def test_large_job_is_still_split_when_a_user_was_removed_from_it(client: ArqRedis) -> None:
    raw = without_user(job(LARGE), "ann")
    assert len(raw) > PIECE_BYTES
    await client.set(job_key_prefix + "job", raw)
    await client.zadd(QUEUE, {"job": 1})
    await split(client, "job")
    assert await waiting(client) == [event for event in LARGE if event["user_id"] == "bob"]


async def test_splitting_starts_again_when_the_job_has_changed(
    client: ArqRedis, valkey: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(valkey, job=job(LARGE))
    changed = without_user(job(LARGE), "ann")
    left = iter(range(2))

    def later(job: dict[str, Any]) -> bytes:
        if next(left, None) == 1:
            put(valkey, job=changed)
        return serialize(job)

    monkeypatch.setattr(jobs_module, "serialize", later)
    await split(client, "job")
    assert await waiting(client) == [event for event in LARGE if event["user_id"] == "bob"]


async def test_others_keep_their_events_when_a_large_job_comes_meanwhile(
    client: ArqRedis, valkey: EmbeddedServer
) -> None:
    put(valkey, first=job(events_of("ann", number=10)))
    async with proxy(valkey.socket_path) as between:
        slow = Queue(between.url, Metrics())
        between.hold(b"STRLEN")
        erasing = asyncio.create_task(slow.erase("ann"))
        await eventually(lambda: between.holding)
        put(valkey, large=job(LARGE))
        between.mend()
        await erasing
        await slow.close()
    for job_id in ("first", "large"):
        await split(client, job_id)  # as a worker does
    assert [event for event in await waiting(client) if event["user_id"] == "bob"] == LARGE[1::2]


async def test_both_users_are_gone_when_two_are_erased_at_once(client: ArqRedis, valkey: EmbeddedServer) -> None:
    events = events_of("ann", "bob", "cy", number=30)
    put(valkey, **{f"job{number}": job(events) for number in range(50)})
    queues = [Queue(valkey.url, Metrics()) for _ in range(2)]
    assert await asyncio.gather(*(each.erase(user) for each, user in zip(queues, ("ann", "bob"), strict=True))) == [
        50,
        50,
    ]
    for each in queues:
        await each.close()
    assert {event["user_id"] for event in await waiting(client)} == {"cy"}


@pytest.mark.parametrize(
    "user", ["t", "f", "a", "k", "et", TIP_EVENTS, CONSUME, BURY, "traceparent", "user_id", "the", "events"]
)
async def test_jobs_stay_when_the_user_has_the_name_of_a_field(
    valkey: EmbeddedServer, published: Queue, user: str
) -> None:
    reason = "the event [3] of 9 is missing, not msgpack, or larger than 262,144 bytes; the rest cannot be read"
    jobs = {
        "events": job(events_of("ann", number=3)),
        "traced": job(events_of("ann", number=3), k={"traceparent": TRACEPARENT}),
        "consume": job([1, 2], f=CONSUME),
        "bury": job("noise", reason, f=BURY),
        "prune": job({"events": 1, "decisions": 2}, f="prune"),
        "cron": job(f="cron:prune:others"),
    }
    put(valkey, **jobs)
    assert await published.erase(user) == 0
    assert {job_id: ask(valkey, "GET", job_key_prefix + job_id) for job_id in jobs} == jobs


async def test_user_is_erased_when_named_beside_the_arguments(valkey: EmbeddedServer, published: Queue) -> None:
    jobs = {
        "keyword": job([], k={"for": "ann"}),
        "keywords": job([], k=["ann"]),
        "name": job([], f="mail ann"),
        "field": job([], by="ann"),
        "buried": job(["ann"], "why", f=BURY),
    }
    put(valkey, **jobs)
    assert await published.erase("ann") == len(jobs)
    assert not [job_id for job_id in jobs if b"ann" in ask(valkey, "GET", job_key_prefix + job_id)]


async def test_erasing_waits_until_a_worker_has_stored_the_events(valkey: EmbeddedServer, published: Queue) -> None:
    put(valkey, job=job(events_of("ann", "bob", number=2)), other=job(events_of("bob", number=2)))
    for job_id in ("job", "other"):
        ask(valkey, "SET", in_progress_key_prefix + job_id, "1")
    erasing = asyncio.create_task(published.erase("ann"))
    await eventually(lambda: b"ann" not in ask(valkey, "GET", job_key_prefix + "job"))
    ask(valkey, "PING")
    assert not erasing.done()
    ask(valkey, "DEL", in_progress_key_prefix + "job")
    assert await erasing == 1


async def test_erasing_is_incomplete_when_a_worker_does_not_finish(
    valkey: EmbeddedServer, published: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECKS", 2)
    put(valkey, job=job(events_of("ann", number=2)))
    ask(valkey, "SET", in_progress_key_prefix + "job", "1")
    with pytest.raises(QueueUnavailable) as raised:
        await published.erase("ann")
    assert raised.value.public_reason == "a worker is still storing events of the user"


@pytest.mark.slow
async def test_event_loop_runs_on_between_jobs(valkey: EmbeddedServer, published: Queue) -> None:
    """The id occurs in every job, but names no user. So each job is examined, and none changes. CPU time is measured,
    because the machine may be busy."""
    events = [{**event, "tip_id": "t"} for event in events_of("ann", number=1_500)]
    put(valkey, **{f"job{number}": job(events) for number in range(module.JOBS_AT_ONCE)})
    waits: list[float] = []

    async def watch() -> None:
        last = thread_time()
        while True:
            await asyncio.sleep(0)
            last, waited = thread_time(), thread_time() - last
            waits.append(waited)

    watching = asyncio.create_task(watch())
    assert await published.erase("event") == 0
    await asyncio.sleep(0)  # notes the last wait
    await end([watching])
    assert max(waits) < sum(waits) / 5
