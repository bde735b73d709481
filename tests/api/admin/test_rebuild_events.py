"""`GET /admin/rebuilds/{id}/events`: a rebuild, live."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx
import pytest

from app.asgi import about_to_stop
from app.profiles.rebuild.progress import RunProgress
from tests.api.admin.test_rebuilds import look, start
from tests.api.test_metrics import scrape
from tests.support.events import served
from tests.support.live import Live, new_user, problem
from tests.support.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="session")
ROUTE = "/admin/rebuilds/{run_id}/events"


class Event(NamedTuple):
    """One event of a stream."""

    name: str
    id: str
    body: dict[str, Any]


async def events(answer: httpx.Response) -> AsyncIterator[Event]:
    """Those of a stream, as a browser reads them; comments and what is no event are left out."""
    fields: dict[str, str] = {}
    async for line in answer.aiter_lines():
        if not line and "data" in fields:
            yield Event(fields["event"], fields["id"], json.loads(fields["data"]))
        if not line:
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value


@asynccontextmanager
async def following(site: Live, run_id: str) -> AsyncIterator[AsyncIterator[Event]]:
    """A stream, read as it comes."""
    async with site.client.stream("GET", f"/admin/rebuilds/{run_id}/events") as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-store"
        yield events(answer)


def watch(site: Live) -> RunProgress:
    """The site's watch."""
    found: RunProgress = site.app.state.api.watch
    return found


async def some_users(site: Live) -> list[str]:
    """Three users with an event each."""
    users = [new_user() for _ in range(3)]
    await site.send(*(served(user, site.now_ms) for user in users))
    return users


async def test_follower_sees_the_run_from_the_queue_to_its_end(site: Live) -> None:
    run = await start(site, {"user_ids": await some_users(site)})
    async with following(site, run["id"]) as stream:
        first = await anext(stream)
        assert (first.name, first.id, first.body) == ("progress", "queued-0", run)
        await site.service.book.advance(run["id"], 1, "1", site.now_ms)
        second = await anext(stream)
        assert (second.body["state"], second.body["done"]) == ("running", 1)
        await site.service.runner.run(run["id"], budget_s=30)
        (last,) = [event async for event in stream][-1:]
    assert last.id == "completed-3"
    assert last.body == await look(site, run["id"])
    await eventually(lambda: watch(site).followers == 0)


async def test_browser_is_told_not_to_come_back_when_it_has_seen_the_end(site: Live) -> None:
    run = await start(site, {"user_ids": await some_users(site)})
    await site.client.delete(f"/admin/rebuilds/{run['id']}")
    async with following(site, run["id"]) as stream:
        (last,) = [event async for event in stream]
    path = f"/admin/rebuilds/{run['id']}/events"
    again = await site.client.get(path, headers={"Last-Event-ID": last.id})
    assert (again.status_code, again.content) == (204, b"")
    other = await site.client.get(path, headers={"Last-Event-ID": "running-0"})
    assert other.status_code == 200


async def test_stream_is_over_when_the_client_goes_away(site: Live) -> None:
    run = await start(site, {"user_ids": await some_users(site)})
    async with following(site, run["id"]) as stream:
        await anext(stream)
        assert watch(site).followers == 1
    await eventually(lambda: watch(site).followers == 0)


async def test_stream_is_no_latency_of_the_service(own_site: Live) -> None:
    run = await start(own_site, {"user_ids": ["u"]})
    loop = asyncio.get_running_loop()
    async with following(own_site, run["id"]) as stream:
        began = loop.time()
        await anext(stream)
        await eventually(lambda: loop.time() - began > 0.3)
        await own_site.client.delete(f"/admin/rebuilds/{run['id']}")
        assert [event.body["state"] async for event in stream] == ["cancelled"]
    seen = await scrape(own_site)
    labels = {"method": "GET", "route": ROUTE, "status": "200"}
    assert seen.value("http_request_duration_seconds_count", **labels) == 1
    assert seen.value("http_request_duration_seconds_sum", **labels) < 0.25


async def test_every_stream_ends_at_once_when_the_process_stops(own_site: Live) -> None:
    run = await start(own_site, {"user_ids": ["u"]})
    async with following(own_site, run["id"]) as one, following(own_site, run["id"]) as other:
        assert (await anext(one)).id == (await anext(other)).id == "queued-0"
        about_to_stop(own_site.app)
        async with asyncio.timeout(2):
            assert [event async for event in one] == [event async for event in other] == []
    assert (await look(own_site, run["id"]))["state"] == "queued"


async def test_follower_is_refused_when_there_is_no_such_run(site: Live) -> None:
    problem(await site.client.get("/admin/rebuilds/nope/events", headers={"Accept": "text/event-stream"}), 404)
