"""Overload over HTTP: 503 with `Retry-After`, counted by kind; hits, probes and admin routes are not shed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from unittest.mock import AsyncMock

import pytest

from app.api.middleware import body_limits
from app.concurrency.overload import OverloadQueue
from tests.support.events import body, served
from tests.support.live import JSON, Live, new_user, problem
from tests.support.waiting import eventually


@pytest.fixture
def overload(monkeypatch: pytest.MonkeyPatch) -> Callable[[object, bool], None]:
    """Makes all objects of a class look overloaded, or not."""
    return lambda owner, full: monkeypatch.setattr(type(owner), "overloaded", property(lambda _: full))


def shed(site: Live, kind: str) -> float:
    value = site.service.metrics.collectors.get_sample_value("profiles_requests_shed_total", {"kind": kind})
    return value or 0.0


@pytest.mark.parametrize("plain", [True, False])
async def test_cold_reads_are_shed_and_hits_answered_under_overload(
    own_site: Live, overload: Callable[[object, bool], None], monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    site, query = own_site, "" if plain else "?detail=true"
    warm, cold = new_user(), new_user()
    for _ in range(2):
        await site.features(warm)
        await site.filled()
    overload(site.service.computation, True)

    with monkeypatch.context() as patch:
        wait = AsyncMock(return_value=True)
        patch.setattr(OverloadQueue, "wait", wait)
        answer = await site.client.get(f"/profiles/{cold}{query}", headers={"X-Request-Id": "mine"})
        assert wait.await_count == 1, "a shed request has waited once"
    assert "too much load (reads)" in problem(answer, 503)["detail"]
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["cache-control"] == "no-store"
    assert shed(site, "reads") == 1
    batch = await site.client.post("/profiles/batch", content=json.dumps({"user_ids": [warm, cold]}), headers=JSON)
    problem(batch, 503)
    assert shed(site, "reads") == 2

    assert (await site.client.get(f"/profiles/{warm}{query}")).status_code == 200
    both = json.dumps({"user_ids": [warm, warm]})
    assert (await site.client.post("/profiles/batch", content=both, headers=JSON)).status_code == 200
    for path in ("/healthz", "/readyz", "/metrics", "/admin", f"/admin/users/{cold}", "/features"):
        assert (await site.client.get(path)).status_code == 200, path
    assert (await site.client.post(f"/admin/users/{cold}/rebuild")).status_code == 200
    counted = site.service.metrics.request_seconds.labels("GET", "/profiles/{user_id}", 503)
    assert sum(counted.counts) == 1


async def test_events_are_shed_unread_under_overload(own_site: Live, overload: Callable[[object, bool], None]) -> None:
    site, user = own_site, new_user()
    overload(site.service.ingestor, True)
    answer = await site.client.post("/events", content=body(served(user, site.now_ms)), headers=JSON)
    assert "too much load (events)" in problem(answer, 503)["detail"]
    assert answer.headers["retry-after"] == "1"
    assert shed(site, "events") == 1
    assert sum(site.service.metrics.request_seconds.labels("POST", "/events", 503).counts) == 1
    problem(await site.client.post("/events", content=b"{" * 1_000_000, headers=JSON), 503)
    assert (await site.features(user))["tip_volume_30d"] == 0
    overload(site.service.ingestor, False)
    await site.send(served(user, site.now_ms))
    assert (await site.features(user))["tip_volume_30d"] == 1


async def test_events_are_stored_when_the_overload_ends_in_time(
    own_site: Live, overload: Callable[[object, bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, user = own_site, new_user()

    async def relieved(_: OverloadQueue) -> bool:
        overload(site.service.ingestor, False)
        return True

    overload(site.service.ingestor, True)
    monkeypatch.setattr(OverloadQueue, "wait", relieved)
    await site.send(served(user, site.now_ms))
    assert shed(site, "events") == 0
    assert (await site.features(user))["tip_volume_30d"] == 1


async def test_training_set_is_shed_under_overload(own_site: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    site = own_site
    monkeypatch.setattr(type(site.service.computation), "history_overloaded", lambda _, rows=1: True)
    rows = json.dumps({"rows": [{"user_id": "u", "as_of": "2026-11-01T00:00:00Z"}]})
    problem(await site.client.post("/profiles/history", content=rows, headers=JSON), 503)
    problem(await site.client.get("/profiles/u?as_of=2026-11-01T00:00:00Z"), 503)
    assert shed(site, "history") == 2
    assert (await site.client.get("/profiles/u")).status_code == 200


@pytest.mark.parametrize("path", ["/profiles/batch", "/events"])
async def test_body_is_shed_when_too_many_bytes_are_held(
    own_site: Live, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    site = own_site
    size, part = 900_000, 300_000
    monkeypatch.setattr(body_limits, "BODIES_BYTES", 3 * part + 100_000)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    )
    writers = []
    for _ in range(3):
        _, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(head.encode() + b" " * part)
        await writer.drain()
        writers.append(writer)
    gateway = site.app.asgi_handler.inner  # type: ignore[attr-defined]  # the edge, behind the fast path
    await eventually(lambda: gateway.bodies.held == 3 * part)

    answer = await site.client.post(path, content=b" " * part, headers=JSON)
    assert "too much load (bodies)" in problem(answer, 503)["detail"]
    assert shed(site, "bodies") == 1
    small = json.dumps({"user_ids": ["u"]}) if path == "/profiles/batch" else body(served("u", site.now_ms))
    assert (await site.client.post(path, content=small, headers=JSON)).status_code in (200, 202)

    for writer in writers:
        writer.close()
    await eventually(lambda: gateway.bodies.held == 0)
