"""Large jobs: set aside before arq fetches them, and read in pieces that are what was published."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Callable
from datetime import UTC
from typing import Any

import msgspec
import pytest
from arq.connections import ArqRedis
from arq.constants import job_key_prefix
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidInput, QueueUnavailable
from app.stores.queue import large_jobs as module
from app.stores.queue.client import BURY, LARGE_TIP_EVENTS, PICKLED, TIP_EVENTS, Queue, connect, deserialize, serialize
from app.stores.queue.large_jobs import LargeJob, Position, set_aside, split
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
    found, end = split(whole[:cut], most)
    assert (found, end) == (values[: len(complete)], complete[-1] if complete else 0)


@given(st.binary(max_size=200))
def test_splitting_never_raises(raw: bytes) -> None:
    values, end = split(raw, 10)
    assert (len(values) > 0) == (end > 0)
    assert end <= len(raw)


@pytest.fixture
async def client(own_valkey: EmbeddedServer) -> AsyncIterator[ArqRedis]:
    connected = connect(own_valkey.url)
    yield connected
    await connected.aclose(close_connection_pool=True)


async def standing(client: ArqRedis) -> tuple[str, list[Any]]:
    """Name and arguments of the job that stands under the id."""
    raw = await client.get(KEY)
    assert raw is not None
    job = deserialize(raw)
    return job["f"], job["a"]


async def test_large_job_continues_where_it_stopped(client: ArqRedis) -> None:
    await client.enqueue_job(TIP_EVENTS, EVENTS, _job_id="job")
    lives_ms = await client.pttl(KEY)
    await set_aside(client, "job")
    await set_aside(client, "job")  # what stands there now is small
    name, arguments = await standing(client)
    assert (name, arguments[1:]) == (LARGE_TIP_EVENTS, [0, len(EVENTS)])
    assert lives_ms - 10_000 < await client.pttl(KEY) <= lives_ms
    seen: list[object] = []
    while (position := Position(*(await standing(client))[1])).taken < position.events:
        job = LargeJob(client, "job")  # another one each time, as after a kill
        piece, following = await job.read(position)
        assert 0 < len(piece) <= module.PIECE_EVENTS
        seen += piece
        await job.move(following)
    assert seen == EVENTS
    assert 0 < await client.pttl(KEY) <= lives_ms
    await LargeJob(client, "job").forget()
    assert await client.keys("arq:large:*") == []


async def test_small_job_stays_as_it_is(client: ArqRedis) -> None:
    await client.enqueue_job(TIP_EVENTS, EVENTS[:100], _job_id="job")
    before = await client.get(KEY)
    await set_aside(client, "job")
    await set_aside(client, "no job")
    assert await client.get(KEY) == before
    assert await client.exists(job_key_prefix + "no job") == 0


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
    await client.set(KEY, raw)
    await set_aside(client, "job")
    name, (shown, said) = await standing(client)
    assert name == BURY
    assert reason in said
    assert shown.endswith(f"… ({len(raw):,} bytes)")
    assert len(shown) < 10_000
    assert await client.pttl(KEY) == -1, "it lives as long as the job would have"


async def test_job_is_buried_when_it_is_larger_than_allowed(client: ArqRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_JOB_BYTES", 300_000)
    await client.set(KEY, _job(a=[EVENTS * 3]))
    await set_aside(client, "job")
    name, (_, said) = await standing(client)
    assert name == BURY
    assert "300,000" in said
    assert await client.keys("arq:large:*") == []


async def test_rest_is_refused_when_an_event_is_missing_or_too_large(client: ArqRedis) -> None:
    raw = _job(a=[[{"a": 1}, "x" * module.PIECE_BYTES]])
    await client.set(KEY, raw)
    await set_aside(client, "job")
    job, position = LargeJob(client, "job"), Position(*(await standing(client))[1])
    piece, position = await job.read(position)
    assert piece == [{"a": 1}]
    with pytest.raises(InvalidInput, match=r"the event \[1\] of 2 is larger than 262,144 bytes"):
        await job.read(position)
    with pytest.raises(InvalidInput, match=r"the event \[2\] of 3 is missing"):
        await job.read(Position(len(raw), 2, 3))


async def test_nothing_is_lost_when_the_queue_is_away(client: ArqRedis, own_valkey: EmbeddedServer) -> None:
    await client.enqueue_job(TIP_EVENTS, EVENTS, _job_id="job")
    await set_aside(client, "job")
    job, position = LargeJob(client, "job"), Position(*(await standing(client))[1])
    ask(own_valkey, "CONFIG", "SET", "maxclients", "1000")
    own_valkey.kill()
    for asking in (job.read(position), job.move(position), job.forget()):
        with pytest.raises(QueueUnavailable):
            await asking


async def test_erasing_removes_events_from_large_jobs(client: ArqRedis, own_valkey: EmbeddedServer) -> None:
    def event(number: int, size: int) -> dict[str, str]:
        return {"event_id": "x" * size, "user_id": "ann" if number % 3 == 0 else "annabel"}

    sizes = [*range(200, 300), 65_400, 65_500, 65_600, *[100] * 3_000]
    events = [event(number, size) for number, size in enumerate(sizes)]
    await client.enqueue_job(TIP_EVENTS, events, _job_id="job")  # whole
    await client.enqueue_job(TIP_EVENTS, events, _job_id="begun")
    await set_aside(client, "begun")
    job = LargeJob(client, "begun")
    raw = await client.get(job_key_prefix + "begun")
    assert raw is not None
    _, begun = await job.read(Position(*deserialize(raw)["a"]))
    await job.move(begun)

    opened = Queue(own_valkey.url, Metrics())
    assert await opened.erase("ann") == 2
    assert await opened.erase("ann") == 0
    await opened.close()
    for job_id, expected in (("job", events), ("begun", events[begun.taken :])):
        raw = await client.get(job_key_prefix + job_id)
        assert raw is not None
        position, left = Position(*deserialize(raw)["a"]), list[object]()
        while position.taken < position.events:
            piece, position = await LargeJob(client, job_id).read(position)
            left += piece
        assert left == [item for item in expected if item["user_id"] == "annabel"]
    await job.forget()
    assert not await job.erase("ann", begun)
    assert await client.keys("arq:large:begun") == []
