"""The ASGI edge: limits on the head of a request, and the cost of hostile requests."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from litestar.types import Receive, Scope, Send

from app.api.middleware.edge import MAX_COOKIES, MAX_HEADER_BYTES, MAX_PARAMETERS, MAX_TARGET_BYTES, Edge
from app.settings import Settings
from app.stores.valkey.embedded import EmbeddedServer
from app.telemetry import Metrics
from tests.bench.hostile import AIM_S, application_of, bodies, heads, slowest
from tests.support.registry import FEATURES

SCOPE: Any = {
    "type": "http",
    "method": "GET",
    "path": "/features",
    "raw_path": b"/features",
    "query_string": b"",
    "headers": [],
}


async def nothing(*_: object) -> Any:
    """Neither receives nor sends."""


async def test_request_counts_as_499_when_it_is_cancelled() -> None:
    reached = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        reached.set()
        await asyncio.Event().wait()

    metrics = Metrics()
    request = asyncio.get_running_loop().create_task(Edge(endless, metrics, {})(SCOPE, nothing, nothing))
    await reached.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    counted = {
        sample.labels["status"]: sample.value
        for family in metrics.collectors.collect()
        for sample in family.samples
        if sample.name == "profiles_http_request_duration_seconds_count"
    }
    assert counted == {"499": 1}


async def through(headers: list[tuple[bytes, bytes]], **changes: object) -> tuple[list[Any], list[Any]]:
    """The headers of each request that reached the application, and the messages sent."""
    reached: list[Any] = []
    sent: list[Any] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope["headers"])

    async def send(message: Any) -> None:
        sent.append(message)

    scope: Any = {**SCOPE, "headers": headers, **changes}
    metrics = Metrics()
    await Edge(inner, metrics, {})(scope, nothing, send)
    return reached, sent


async def test_header_is_refused_unparsed_when_it_is_too_long() -> None:
    for name in (b"cookie", b"accept", b"authorization", b"x-api-key", b"x-anything"):
        reached, sent = await through([(name, b"\\" * (MAX_HEADER_BYTES + 1))])
        assert (reached, sent[0]["status"]) == ([], 431), name
        detail = msgspec.json.decode(sent[1]["body"])["detail"]
        assert f"header {name.decode()} has 8,193 bytes" in detail
        assert ("cookies of other applications" in detail) == (name == b"cookie")
        reached, _ = await through([(name, b"\\" * MAX_HEADER_BYTES)])
        assert len(reached) == 1, name


async def test_target_is_refused_unparsed_when_it_is_too_long() -> None:
    for part in ("raw_path", "query_string"):
        for longer in (False, True):
            reached, sent = await through([], **{part: b"/" + b"a" * (MAX_TARGET_BYTES - 1 + longer)})
            assert len(reached) == (not longer), part
            assert [message["status"] for message in sent[:1]] == [414] * longer, part


async def test_cookies_of_other_applications_are_dropped() -> None:
    sent = (
        b'other="\\101\\"; profiles_session=eyJ.a-b_c;profiles_message_1f=x ; profiles_odd="\\"; xprofiles_a=1; ; =; a'
    )
    (headers,), _ = await through([(b"cookie", sent), (b"x-a", b"1"), (b"cookie", b"profiles_b=2")])
    own = b"profiles_session=eyJ.a-b_c; profiles_message_1f=x; profiles_b=2"
    assert headers == [(b"x-a", b"1"), (b"cookie", own)]


async def test_number_of_cookies_and_parameters_is_bounded() -> None:
    (headers,), _ = await through([(b"cookie", b";".join(b"profiles_%d=" % number for number in range(200)))])
    assert headers[0][1].count(b"profiles_") == MAX_COOKIES
    for parameters in (MAX_PARAMETERS, MAX_PARAMETERS + 1):
        reached, sent = await through([], query_string=b"&".join([b"a=1"] * parameters))
        assert (len(reached), [message["status"] for message in sent[:1]]) in ((1, []), (0, [400]))
        assert bool(reached) == (parameters == MAX_PARAMETERS)


@pytest.mark.slow
async def test_anonymous_requests_do_not_block_the_event_loop(database_path: Path, valkey: EmbeddedServer) -> None:
    settings = Settings(features=FEATURES, database=database_path, cache_url=valkey.url, queue_url=valkey.url)
    async with application_of(settings) as application:
        for requests in (heads(["/admin", "/healthz"]), bodies()):
            seconds, name = await slowest(application, requests)
            assert seconds < 5 * AIM_S, f"{seconds * 1000:.0f} ms: {name}"  # on a busy machine
