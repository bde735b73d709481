"""One trace through every process: requests, their stores, the queue and the worker."""

import json
from collections.abc import Iterator

import pytest
from arq.connections import ArqRedis

from app.stores.queue.jobs import TIP_EVENTS
from tests.support.collector import CollectedSpan, Collector, running_collector
from tests.support.events import payload, served
from tests.support.fleet import Fleet
from tests.support.http import Answer, Connection
from tests.support.traffic import now_ms
from tests.support.waiting import eventually

pytestmark = [pytest.mark.both_engines, pytest.mark.slow]
CALLER = "b7ad6b7169203331"
POST, CONSUMED = "POST /events", "consume events"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with running_collector() as collector:
        yield collector


def trace_of(collector: Collector, trace_id: str) -> dict[str, CollectedSpan]:
    """The spans of a trace by name; the first of each name."""
    return {span.name: span for span in reversed(collector.spans) if span.trace_id == trace_id}


async def ask(port: int, method: str, path: str, trace_id: str, value: object = None) -> Answer:
    """Send a request that continues a trace."""
    body = json.dumps(value, default=str).encode() if value is not None else b""
    content = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\ntraceparent: 00-{trace_id}-{CALLER}-01\r\n{content}\r\n"
    connection = Connection(port)
    try:
        return await connection.send(head.encode() + body)
    finally:
        await connection.close()


async def test_trace_goes_from_a_request_through_the_queue_to_the_worker(fleet: Fleet, collector: Collector) -> None:
    worker = fleet.worker(traces_url=collector.url)
    (api,) = await fleet.apis(1, traces_url=collector.url, log_level="debug")
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    event = payload(served("ann", now_ms()))
    assert (await ask(api.port, "POST", "/events", trace_id, event)).status == 202
    await eventually(lambda: {POST, CONSUMED, "job consume_events"} <= trace_of(collector, trace_id).keys())
    spans = trace_of(collector, trace_id)
    assert spans[POST].parent == CALLER
    assert collector.path(spans["event_log.append"]) == [POST, "ingestor.ingest", "event_log.append"]
    assert collector.path(spans["cache.drop"])[0] == POST
    assert collector.path(spans["job consume_events"])[0] == POST
    assert collector.path(spans[CONSUMED])[0] == POST
    assert spans[CONSUMED].links == [spans["job consume_events"].id]
    assert collector.path(spans["learning.concerned"])[-2:] == [CONSUMED, "learning.concerned"]
    assert (spans[POST].service, spans[CONSUMED].service) == ("profiles-api", "profiles-worker")
    assert trace_id in api.program.output  # of the line that logs the request
    for member in (api, worker):  # which sends the rest
        assert member.program.stop() == 0
    assert not any("ann" in span.text for span in collector.spans)
    assert not collector.named("GET /healthz")


async def test_trace_of_a_cold_read_shows_cache_and_statement(fleet: Fleet, collector: Collector) -> None:
    (api,) = await fleet.apis(1, traces_url=collector.url)
    cold, warm = "1af7651916cd43dd8448eb211c80319c", "2af7651916cd43dd8448eb211c80319c"
    route, read = "GET /profiles/{user_id}", "reader.read_shared_values"
    assert (await ask(api.port, "GET", "/profiles/ann", cold)).status == 200
    await eventually(lambda: {route, "cache.fill"} <= trace_of(collector, cold).keys())
    assert (await ask(api.port, "GET", "/profiles/ann", warm)).status == 200
    await eventually(lambda: route in trace_of(collector, warm))
    spans = trace_of(collector, cold)
    for name in ("cache.read_rows", "cache.lease", "source.compute"):
        assert collector.path(spans[name]) == [route, read, name]
    assert trace_of(collector, warm).keys().isdisjoint({"cache.lease", "source.compute"})
    assert collector.path(trace_of(collector, warm)["cache.read_rows"]) == [route, read, "cache.read_rows"]
    assert (await ask(api.port, "GET", "/profiles/a%2fb", cold)).status == 422
    await eventually(lambda: collector.named("GET"))  # without a route, since the path may have anything


async def test_queued_events_continue_the_trace_of_their_job(
    fleet: Fleet, queue: ArqRedis, collector: Collector
) -> None:
    fleet.worker(traces_url=collector.url)
    trace_id = "3af7651916cd43dd8448eb211c80319c"
    events = [payload(served("ann", now_ms())), payload(served("bob", now_ms()))]
    await queue.enqueue_job(TIP_EVENTS, events, traceparent=f"00-{trace_id}-{CALLER}-01")
    await eventually(lambda: {f"job {TIP_EVENTS}", CONSUMED} <= trace_of(collector, trace_id).keys())
    spans = trace_of(collector, trace_id)
    assert spans[f"job {TIP_EVENTS}"].parent == CALLER
    assert collector.path(spans["event_log.append"])[0] == f"job {TIP_EVENTS}"
    assert collector.path(spans[CONSUMED])[0] == f"job {TIP_EVENTS}"


async def test_queued_job_with_a_traceparent_is_stored_when_traces_are_off(fleet: Fleet, queue: ArqRedis) -> None:
    fleet.worker()
    job = payload(served("ann", now_ms(), event_id="traced"))
    await queue.enqueue_job(TIP_EVENTS, [job], traceparent=f"00-3af7651916cd43dd8448eb211c80319c-{CALLER}-01")
    await eventually(lambda: fleet.stored() == {"traced": 1} and not fleet.unconsumed())
