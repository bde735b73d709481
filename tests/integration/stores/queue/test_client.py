"""The queue's adapter: what comes off the queue is always a job of ours, and publishing never fails anybody."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import msgspec
import pytest
import uvloop
from arq.connections import ArqRedis
from arq.constants import default_queue_name, health_check_key_suffix, job_key_prefix
from arq.jobs import deserialize_job_raw
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio.connection import BlockingConnectionPool

from app.errors import QueueUnavailable
from app.stores.queue import client as queue
from app.stores.queue import jobs as jobs_module
from app.stores.queue.client import Queue
from app.stores.queue.jobs import BURY, CONSUME, JOBS, TIP_EVENTS, deserialize, serialize
from app.stores.valkey.embedded import EmbeddedServer
from app.telemetry import Metrics
from tests.support.clock import NOW_MS
from tests.support.servers import ask
from tests.support.waiting import eventually

JOB: dict[str, Any] = {"t": None, "f": TIP_EVENTS, "a": ([{"subject": "…"}],), "k": {}, "et": 1_700_000_000_000}


def packed(**changes: object) -> bytes:
    """A sound job, with fields replaced; a field set to `...` is left out."""
    return msgspec.msgpack.encode({name: value for name, value in {**JOB, **changes}.items() if value is not ...})


def test_constants_are_those_of_arq() -> None:
    theirs = (default_queue_name, health_check_key_suffix, job_key_prefix)
    assert theirs == (queue.QUEUE, queue.HEALTH_SUFFIX, jobs_module.JOB_PREFIX)


def test_own_job_round_trips() -> None:
    expected = {"t": 1, "f": TIP_EVENTS, "a": [[{"subject": "…"}]], "k": {}, "et": 1_700_000_000_000}
    assert deserialize(serialize(JOB)) == expected


def test_job_is_accepted_when_it_has_only_its_name_and_arguments() -> None:
    raw = packed(t=..., k=..., et=...)
    assert deserialize(raw) == {"t": 1, "f": TIP_EVENTS, "a": [[{"subject": "…"}]], "k": {}, "et": 0}


def test_times_and_tries_are_bounded() -> None:
    assert deserialize(packed(et=2**63))["et"] == 0
    assert deserialize(packed(et=-1))["et"] == 0
    assert deserialize(packed(t=2**63))["t"] == jobs_module.MOST_TRIES
    assert deserialize(packed(t=-5))["t"] == 1


FOREIGN: dict[str, list[bytes]] = {
    jobs_module.PICKLED: [pickle.dumps(JOB, protocol) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)],
    "the job is not msgpack": [b"", b"\xc1", b"\x91" * 50_000 + b"\x90", b"\xa1\xff"],
    "not a job": [
        msgspec.msgpack.encode([1, 2]),
        *(packed(f=name) for name in (..., [TIP_EVENTS], 7)),
        *(packed(a=arguments) for arguments in (..., 5)),
        *(packed(k={1: 2}), packed(t="often"), packed(et="yesterday")),
    ],
    "unknown job 'no_job_of_ours'": [packed(f="no_job_of_ours")],
    "unknown job 'cron:evil'": [packed(f="cron:evil")],
    "unknown job 'prune_all'": [packed(f="prune_all")],
    "tip_events takes one argument, a list of events": [packed(a=[]), packed(a=[[], []]), packed(k={"events": []})],
}


@pytest.mark.parametrize("reason", FOREIGN)
def test_foreign_job_becomes_a_burial(reason: str) -> None:
    for raw in FOREIGN[reason]:
        job = deserialize(raw)
        assert job["f"] == BURY, raw[:60]
        payload, said = job["a"]
        assert said.startswith(reason), raw[:60]
        msgspec.json.encode(payload, enc_hook=repr)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("run_rebuild", ["5e1f"]),
        ("measure_quality", [7]),
        ("prune", [{"events": 1}]),
        ("cron:prune", []),
        ("cron:quality:mine", []),
    ],
)
def test_job_of_an_earlier_release_does_nothing(name: str, arguments: list[object]) -> None:
    expected = {"t": 1, "f": TIP_EVENTS, "a": [[]], "k": {}, "et": 0}
    assert deserialize(packed(f=name, a=arguments, k={"traceparent": "00-1-2-01"})) == expected


def test_nothing_is_run_when_a_job_is_a_pickle() -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return pytest.fail, ("the pickle was opened",)

    assert deserialize(pickle.dumps({**JOB, "a": (Trap(),)}))["f"] == BURY


@given(
    st.binary(max_size=200)
    | st.builds(
        msgspec.msgpack.encode,
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from("fakt") | st.just("et"), inner, max_size=5)
            ),
        ),
    )
)
def test_arq_continues_for_any_bytes(raw: bytes) -> None:
    name, args, kwargs, tries, enqueued_at_ms = deserialize_job_raw(raw, deserializer=deserialize)
    assert name in JOBS
    assert isinstance(list(args), list)
    assert all(isinstance(key, str) for key in kwargs)
    assert 1 <= tries <= jobs_module.MOST_TRIES
    assert 0 <= enqueued_at_ms < jobs_module.YEAR_3000_MS


async def jobs(client: ArqRedis) -> list[tuple[str, tuple[Any, ...]]]:
    """Name and arguments of each job on the queue."""
    return [(job.function, tuple(job.args)) for job in await client.queued_jobs()]


async def test_many_events_share_a_job_when_they_are_published_together(published: Queue, client: ArqRedis) -> None:
    for seq in range(1, 51):
        published.publish([seq, seq + 100])
    published.publish([])
    await published.close()
    ((name, (seqs,)),) = await jobs(client)
    assert name == CONSUME
    assert sorted(seqs) == sorted([*range(1, 51), *range(101, 151)])


async def test_events_per_job_are_bounded(valkey: EmbeddedServer, client: ArqRedis) -> None:
    published = Queue(valkey.url, Metrics(), bounds=queue.BOUNDS._replace(at_once=10))
    published.publish(range(25))
    await published.close()
    assert sorted(len(args[0]) for _, args in await jobs(client)) == [5, 10, 10]


async def test_worker_counts_as_alive_when_its_health_key_stands(published: Queue, valkey: EmbeddedServer) -> None:
    assert not await published.worker_alive()
    ask(valkey, "SET", queue.HEALTH_KEY, "well")
    assert await published.worker_alive()


async def test_failed_publish_is_counted_when_the_queue_is_unreachable() -> None:
    metrics = Metrics()
    away = Queue("unix:///nowhere/queue.sock", metrics)

    def failures() -> float:
        return metrics.collectors.get_sample_value("profiles_publish_failures_total") or 0.0

    away.publish([1, 2])
    await eventually(lambda: failures() == 1)
    away.publish([3])
    await eventually(lambda: failures() == 2)
    with pytest.raises(QueueUnavailable):
        await away.depth()
    with pytest.raises(QueueUnavailable):
        await away.worker_alive()
    await away.close()


def test_failed_publish_is_counted_when_the_connection_ends(
    valkey: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvloop's transport then raises a RuntimeError, which redis-py passes on. Found by the torture run."""
    ensure = BlockingConnectionPool.ensure_connection

    async def ended(pool: BlockingConnectionPool, connection: Any) -> None:
        await ensure(pool, connection)
        connection._writer.transport.abort()
        await asyncio.sleep(0)

    async def main() -> None:
        metrics = Metrics()
        opened = Queue(valkey.url, metrics)
        with monkeypatch.context() as patch:
            patch.setattr(BlockingConnectionPool, "ensure_connection", ended)
            opened.publish([1])
            await eventually(lambda: metrics.collectors.get_sample_value("profiles_publish_failures_total") == 1)
            with pytest.raises(QueueUnavailable):
                await opened.depth()
        assert await opened.depth() == 0
        await opened.close()

    uvloop.run(main())


async def test_publishing_continues_when_the_queue_returns(own_valkey: EmbeddedServer) -> None:
    metrics = Metrics()
    opened = Queue(own_valkey.url, metrics)
    opened.publish([1])
    await eventually(lambda: ask(own_valkey, "ZCARD", queue.QUEUE) == 1)
    own_valkey.kill()
    opened.publish([2])
    await eventually(lambda: metrics.collectors.get_sample_value("profiles_publish_failures_total") == 1)
    own_valkey.start()
    opened.publish([3])
    await eventually(lambda: ask(own_valkey, "ZCARD", queue.QUEUE) == 1)
    await opened.close()
    (key,) = ask(own_valkey, "KEYS", f"{job_key_prefix}*")
    assert deserialize(ask(own_valkey, "GET", key))["a"] == [[3]]


async def test_database_is_forgotten_when_its_clock_was_ahead(published: Queue) -> None:
    hour_ms = 3_600_000
    await published.show_database("ahead", NOW_MS + hour_ms)
    await published.show_database("late", NOW_MS - queue.SHOWN_MS + 1)
    assert await published.databases(NOW_MS) == {"late"}
    await published.show_database("own", NOW_MS)
    assert await published.databases(NOW_MS) == {"late", "own"}
    assert await published.databases(NOW_MS + hour_ms) == set()


async def test_erasing_removes_events_from_waiting_jobs(own_valkey: EmbeddedServer) -> None:
    def event(user: str) -> dict[str, str]:
        return {"user_id": user, "tip_id": "t"}

    several = [[event("ann"), event("bob"), event("ann")]]
    jobs = {
        "both": packed(a=several),
        "hers": packed(a=[[event("ann")]]),
        "his": packed(a=[[event("bob")]]),
        "unknown": packed(f="tip_event", a=several),
        "no list": packed(a=[event("ann")]),
        "no job": msgspec.msgpack.encode(["ann"]),
        "pickle": pickle.dumps({"f": "x", "a": (event("ann"),)}),
        "numbers": packed(f=CONSUME, a=[[1, 2]]),
    }
    for number, (job_id, raw) in enumerate(jobs.items()):
        ask(own_valkey, "SET", job_key_prefix + job_id, raw, "PX", 60_000)
        ask(own_valkey, "ZADD", queue.QUEUE, number, job_id)
    ask(own_valkey, "ZADD", queue.QUEUE, 99, "gone")

    opened = Queue(own_valkey.url, Metrics())
    assert await opened.erase("ann") == 6

    held = {job_id: ask(own_valkey, "GET", job_key_prefix + job_id) for job_id in jobs}
    assert not [job_id for job_id, raw in held.items() if b"ann" in raw]
    assert {job_id for job_id in jobs if held[job_id] == jobs[job_id]} == {"his", "numbers"}
    assert deserialize(held["both"])["a"] == [[event("bob")]]
    assert deserialize(held["unknown"])["a"][0]["a"] == [[event("bob")]]
    nothing = {"t": 1, "f": TIP_EVENTS, "a": [[]], "k": {}, "et": 0}
    assert [deserialize(held[job_id]) for job_id in ("no job", "pickle")] == [nothing, nothing]
    assert 0 < ask(own_valkey, "PTTL", job_key_prefix + "both") <= 60_000
    assert ask(own_valkey, "EXISTS", job_key_prefix + "gone") == 0
    assert await opened.erase("ann") == 0
    await opened.close()
