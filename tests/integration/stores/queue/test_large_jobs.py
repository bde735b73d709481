"""Large jobs: split, before arq fetches them, into small ones that hold what was published."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from datetime import UTC
from typing import Any

import msgspec
import pytest
from arq.connections import ArqRedis
from arq.constants import job_key_prefix
from hypothesis import given
from hypothesis import strategies as st

from app.stores.queue import jobs as module
from app.stores.queue.client import QUEUE, Queue
from app.stores.queue.jobs import BURY, PICKLED, TIP_EVENTS, deserialize, leading, serialize, split
from app.stores.valkey.embedded import EmbeddedServer
from app.telemetry import Metrics
from tests.support.servers import ask

KEY = job_key_prefix + "job"
EVENTS = [{"event_id": f"event-{number}", "more": "x" * (number % 50)} for number in range(9_000)]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.binary(max_size=300)
    | st.datetimes(timezones=st.just(UTC)),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=5), inner, max_size=18),
    max_leaves=30,
)


@given(st.lists(VALUES, max_size=5), st.integers(0, 6), st.data())
def test_values_are_split_where_they_end(values: list[Any], most: int, data: st.DataObject) -> None:
    packed = [msgspec.msgpack.encode(value) for value in values]
    whole = b"".join(packed)
    cut = data.draw(st.integers(0, len(whole)))
    complete = [end for end in (len(b"".join(packed[: n + 1])) for n in range(len(packed))) if end <= cut][:most]
    found, end = leading(whole[:cut], most)
    assert (found, end) == (values[: len(complete)], complete[-1] if complete else 0)


@given(st.binary(max_size=200))
def test_splitting_never_raises(raw: bytes) -> None:
    values, end = leading(raw, 10)
    assert (len(values) > 0) == (end > 0)
    assert end <= len(raw)


async def waiting(client: ArqRedis) -> list[tuple[str, list[Any]]]:
    """Name and arguments of every job on the queue, in the order in which a worker takes them."""
    ids = sorted(await client.zrange(QUEUE, 0, -1), key=lambda job_id: int(job_id.partition(b":")[2] or -1))
    return [
        (job["f"], job["a"]) for job in map(deserialize, await client.mget(job_key_prefix + i.decode() for i in ids))
    ]


async def test_large_job_is_split_into_small_ones(client: ArqRedis) -> None:
    await client.enqueue_job(TIP_EVENTS, EVENTS, _job_id="job")
    ((_, published),) = await client.zrange(QUEUE, 0, -1, withscores=True)
    lives_ms = await client.pttl(KEY)
    await asyncio.gather(*(split(client, "job") for _ in range(3)))
    await split(client, "job")  # it is small now
    (name, arguments), *pieces = await waiting(client)
    assert (name, arguments) == (TIP_EVENTS, [[]])
    assert {name for name, _ in pieces} == {TIP_EVENTS}
    assert [event for _, (events,) in pieces for event in events] == EVENTS
    assert all(0 < len(events) <= module.PIECE_EVENTS for _, (events,) in pieces)
    for key in await client.keys(job_key_prefix + "*"):
        assert lives_ms - 10_000 < await client.pttl(key) <= lives_ms
        assert await client.strlen(key) <= module.PIECE_BYTES
    assert {score for _, score in await client.zrange(QUEUE, 0, -1, withscores=True)} == {published}
    raw = await client.get(job_key_prefix + "job:0")
    assert raw is not None
    assert deserialize(raw)["et"] == published, "the lag counts from the time of publishing"


@pytest.mark.parametrize("done", [1, 5])
async def test_no_event_is_lost_or_doubled_when_splitting_is_interrupted(
    client: ArqRedis, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    await client.enqueue_job(TIP_EVENTS, EVENTS, _job_id="job")
    left = iter(range(done))

    def failing(job: dict[str, Any]) -> bytes:
        next(left)
        return serialize(job)

    with monkeypatch.context() as patch:
        patch.setattr(module, "serialize", failing)
        with pytest.raises(RuntimeError):
            await split(client, "job")
    assert await waiting(client) == [(TIP_EVENTS, [EVENTS])]
    await split(client, "job")
    _, *pieces = await waiting(client)
    assert [event for _, (events,) in pieces for event in events] == EVENTS


async def test_splitting_ends_when_another_process_was_first(
    client: ArqRedis, valkey: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would enqueue events again that an erasure has removed meanwhile."""
    await client.enqueue_job(TIP_EVENTS, EVENTS, _job_id="job")

    def later(job: dict[str, Any]) -> bytes:
        monkeypatch.setattr(module, "serialize", serialize)
        ask(valkey, "SET", KEY, serialize({"f": TIP_EVENTS, "a": [[]]}))
        return serialize(job)

    monkeypatch.setattr(module, "serialize", later)
    await split(client, "job")
    assert await waiting(client) == [(TIP_EVENTS, [[]])]
    assert await client.keys(job_key_prefix + "*") == [KEY.encode()]


async def test_job_that_was_split_before_it_is_read_stays_as_it_is(
    client: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.enqueue_job(TIP_EVENTS, EVENTS, _job_id="job")
    small, size = serialize({"f": TIP_EVENTS, "a": [[]]}), int(await client.strlen(KEY))

    async def strlen(key: str) -> int:
        await client.set(key, small)
        return size

    monkeypatch.setattr(client, "strlen", strlen)
    await split(client, "job")
    assert await client.get(KEY) == small


async def test_small_job_stays_as_it_is(client: ArqRedis) -> None:
    await client.enqueue_job(TIP_EVENTS, EVENTS[:100], _job_id="job")
    before = await client.get(KEY)
    await split(client, "job")
    await split(client, "no job")
    assert await client.get(KEY) == before
    assert await client.exists(job_key_prefix + "no job") == 0


async def published(client: ArqRedis, raw: bytes) -> None:
    await client.set(KEY, raw)
    await client.zadd(QUEUE, {"job": 1})


def _job(**changes: object) -> bytes:
    return serialize({"t": None, "f": TIP_EVENTS, "a": [EVENTS], "k": {}, "et": 0, **changes})


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "pickle": (lambda: pickle.dumps({"f": TIP_EVENTS, "a": (EVENTS,)}), PICKLED),
    "noise": (lambda: b"\xc1" * 300_000, "a list of events"),
    "text": (lambda: b"{" * 300_000, "a list of events"),
    "another job": (lambda: _job(f="run_rebuild"), "must be tip_events"),
    "two arguments": (lambda: _job(a=[EVENTS, EVENTS]), "with one argument"),
    "no list": (lambda: _job(a=["x" * 300_000]), "a list of events"),
    "a map": (lambda: _job(a=[{"events": EVENTS}]), "a list of events"),
    "arguments first": (lambda: serialize({"a": [EVENTS], "f": TIP_EVENTS}), "as arq writes it"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_large_foreign_job_becomes_a_small_burial(client: ArqRedis, case: str) -> None:
    make, reason = REFUSED[case]
    raw = make()
    await published(client, raw)
    await split(client, "job")
    ((name, (shown, said)),) = await waiting(client)
    assert name == BURY
    assert reason in said
    assert shown.endswith(f"… ({len(raw):,} bytes)")
    assert len(shown) < 10_000
    assert await client.pttl(KEY) == -1, "it lives as long as the job would have"


async def test_job_is_buried_when_it_is_larger_than_allowed(client: ArqRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_JOB_BYTES", 300_000)
    await published(client, _job(a=[EVENTS * 3]))
    await split(client, "job")
    ((name, (_, said)),) = await waiting(client)
    assert name == BURY
    assert "300,000" in said


async def test_rest_is_buried_when_an_event_cannot_be_read(client: ArqRedis) -> None:
    fault = " is missing, not msgpack, or larger than 262,144 bytes; the rest cannot be read"
    large = _job(a=[[{"a": 1}, "x" * module.PIECE_BYTES]])
    for raw, said_of in (
        (large, "the event [1] of 2"),
        (_job(a=[EVENTS])[:-100_000], f" of {len(EVENTS)}"),
        (_job(a=[[*EVENTS, "bad"]]).replace(b"\xa3bad", b"\xc1"), f"the event [{len(EVENTS)}] of {len(EVENTS) + 1}"),
    ):
        await published(client, raw)
        await split(client, "job")
        (name, (_, said)), (_, (first,)), *_ = await waiting(client)
        assert name == BURY
        assert said.endswith(said_of + fault)
        assert first[0] in ({"a": 1}, EVENTS[0])
        await client.flushall()


async def test_erasing_removes_events_from_large_jobs(client: ArqRedis, valkey: EmbeddedServer) -> None:
    events = [{**event, "user_id": "ann" if number % 3 == 0 else "annabel"} for number, event in enumerate(EVENTS)]
    await client.enqueue_job(TIP_EVENTS, events, _job_id="job")
    opened = Queue(valkey.url, Metrics())
    assert await opened.erase("ann") > 1
    assert await opened.erase("ann") == 0
    await opened.close()
    _, *pieces = await waiting(client)
    assert [event for _, (left,) in pieces for event in left] == [
        item for item in events if item["user_id"] == "annabel"
    ]
