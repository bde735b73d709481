"""Spans of a process, sent by the real exporter to a collector on loopback."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from app.telemetry import TRACEPARENT
from app.telemetry.tracing import Tracing
from tests.support.collector import CollectedSpan, Collector, running_collector
from tests.support.waiting import eventually

REMOTE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OTHER = "00-1af7651916cd43dd8448eb211c80319c-c7ad6b7169203331-01"


class Store:
    """A port that can fail."""

    size = 3

    async def read(self, key: str) -> str:
        if key == "broken":
            raise ValueError("the text of an error, which may name a user")
        return key.upper()

    async def append(self, traceparents: list[str]) -> int:
        return len(traceparents)

    def look(self) -> int:
        return self.size


@asynccontextmanager
async def collected() -> AsyncIterator[tuple[Tracing, Collector]]:
    """A process with traces. It is closed, so that all spans are there, when the test closes it or when it ends."""
    with running_collector() as collector:
        tracing = Tracing(collector.url, "test")
        yield tracing, collector
        await tracing.close()


async def request(tracing: Tracing, work: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
    """Run `work` in a request with these headers."""

    async def application(scope: Any, _: Any, send: Any) -> None:
        scope["path_template"] = "/things/{thing}"
        await work()
        await send({"type": "http.response.start", "status": status, "headers": [(b"x-request-id", b"r1")]})

    async def send(_: Any) -> None:
        pass

    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": "GET", "path": "/things/ann", "headers": raw}
    await tracing.middleware(application)(scope, None, send)


def only(spans: list[CollectedSpan]) -> CollectedSpan:
    (span,) = spans
    return span


async def test_port_makes_a_child_span_per_call() -> None:
    async with collected() as (tracing, collector):
        store = tracing.port("store", Store())

        async def work() -> None:
            assert await store.read("ann") == "ANN"
            assert (store.look(), store.size) == (3, 3)

        await store.read("outside of every request")
        await request(tracing, work, {"traceparent": REMOTE})
        await tracing.close()
        served, read = only(collector.named("GET /things/{thing}")), only(collector.named("store.read"))
        assert len(collector.spans) == 2
        assert (served.trace_id, served.parent) == (REMOTE[3:35], REMOTE[36:52])
        assert served.attributes == {
            "http.request.method": "GET",
            "http.response.status_code": 200,
            "http.route": "/things/{thing}",
            "request_id": "r1",
        }
        assert (read.trace_id, read.parent, read.failed) == (served.trace_id, served.id, False)
        assert served.service == "profiles-test"
        assert not any("ann" in span.text for span in collector.spans)


async def test_error_is_named_by_its_type_only() -> None:
    async with collected() as (tracing, collector):
        store = tracing.port("store", Store())
        with pytest.raises(ValueError, match="text of an error"):
            await request(tracing, lambda: store.read("broken"))
        await request(tracing, lambda: store.read("ann"), status=503)
        await tracing.close()
        failed = [span for span in collector.spans if span.attributes.get("error.type") == "ValueError"]
        assert {span.name for span in failed} == {"store.read", "GET /things/{thing}"}
        assert all(span.failed and "text of an error" not in span.text for span in failed)
        assert [span.failed for span in collector.named("GET /things/{thing}")] == [True, True]


async def test_shared_call_has_links_to_the_other_requests() -> None:
    async with collected() as (tracing, collector):
        store = tracing.port("store", Store(), {"append": lambda traceparents: traceparents})

        async def work() -> None:
            await store.append([str(TRACEPARENT.get()), OTHER, OTHER, "not a traceparent"])

        await request(tracing, work)
        await tracing.close()
        assert only(collector.named("store.append")).links == [OTHER[36:52]]


async def test_job_and_consumption_continue_the_traces_that_they_are_given() -> None:
    async with collected() as (tracing, collector):

        async def work(_: dict[str, Any]) -> None:
            with tracing.consuming([REMOTE, None, OTHER, REMOTE]):
                assert str(TRACEPARENT.get()).startswith(REMOTE[:35])

        await tracing.job("consume_events", work)({"job_try": 2}, traceparent=OTHER)
        await tracing.job("consume_events", work)({}, traceparent=["nonsense"])
        assert TRACEPARENT.get() is None
        await tracing.close()
        first, second = sorted(collector.named("job consume_events"), key=lambda span: span.parent, reverse=True)
        assert (first.trace_id, first.parent, first.attributes) == (OTHER[3:35], OTHER[36:52], {"job.try": 2})
        assert second.parent == ""
        consumed = [span for span in collector.named("consume events") if span.links == [first.id]]
        assert {(span.trace_id, span.parent) for span in consumed} == {
            (REMOTE[3:35], REMOTE[36:52]),
            (OTHER[3:35], OTHER[36:52]),
        }


async def test_request_is_not_traced_when_the_caller_does_not_sample() -> None:
    async with collected() as (tracing, collector):
        store = tracing.port("store", Store())
        await request(tracing, lambda: store.read("ann"), {"traceparent": REMOTE[:-1] + "0"})
        await tracing.close()
        assert collector.spans == []


def exporters() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("Otel")]


@pytest.mark.slow
async def test_close_ends_in_time_when_the_collector_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.telemetry.tracing.CLOSE_S", 0.1)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracing = Tracing(f"http://127.0.0.1:{silent.getsockname()[1]}", "test")
        await request(tracing, lambda: asyncio.sleep(0))
        await tracing.close()
        assert exporters(), "it waited for the collector"
        connection, _ = await asyncio.to_thread(silent.accept)
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await eventually(lambda: not exporters())
