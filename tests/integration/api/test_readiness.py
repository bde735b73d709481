"""`/healthz` and `/readyz`, in every state of database, cache, queue and worker."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from functools import partial
from typing import Any

import pytest

from app.errors import StoreUnavailable
from app.stores.queue.client import HEALTH_KEY
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.events import served
from tests.support.live import Live, new_user
from tests.support.servers import ask
from tests.support.site import ServeSite
from tests.support.waiting import eventually_async


async def ready(site: Live, status: int = 200) -> dict[str, Any]:
    assert (await site.client.get("/healthz")).json() == {"status": "alive"}
    answer = await site.client.get("/readyz")
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    body: dict[str, Any] = answer.json()
    assert body.keys() == {"status", "checks"}
    assert body["checks"].keys() >= {"database", "cache", "queue"}
    return body


async def test_site_is_ready_when_all_components_answer(
    serve_site: ServeSite, cache: EmbeddedServer, queue: EmbeddedServer
) -> None:
    async with serve_site(cache_url=cache.url, queue_url=queue.url) as site:
        assert await ready(site) == {
            "status": "ready",
            "checks": dict.fromkeys(("database", "invalidations", "cache", "queue", "worker", "features"), "ok"),
        }


async def test_site_is_degraded_when_no_worker_is_running(
    serve_site: ServeSite, cache: EmbeddedServer, queue: EmbeddedServer
) -> None:
    ask(queue, "DEL", HEALTH_KEY)
    async with serve_site(cache_url=cache.url, queue_url=queue.url) as site:
        body = await ready(site)
    assert body["status"] == "degraded"
    assert [name for name, text in body["checks"].items() if text != "ok"] == ["worker"]
    assert "worker" in body["checks"]["worker"]


@pytest.mark.slow
async def test_site_is_degraded_when_the_cache_is_down(
    serve_site: ServeSite, cache: EmbeddedServer, queue: EmbeddedServer
) -> None:
    async with serve_site(cache_url=cache.url, queue_url=queue.url) as site:
        user = new_user()
        cache.kill()
        body = await ready(site)
        assert body["status"] == "degraded"
        assert body["checks"]["cache"] == "it does not answer; reads compute from the database"
        assert (await site.send(served(user, site.now_ms)))["invalidated"] is False
        body = await ready(site)
        assert body["checks"]["invalidations"].startswith("1 invalidations are owed")
        assert (await site.features(user))["tip_volume_30d"] == 1
        cache.start()
        await eventually_async(partial(_settled, site))
        assert (await ready(site))["status"] == "ready"
        assert (await site.features(user))["tip_volume_30d"] == 1


async def _settled(site: Live) -> bool:
    return site.service.cache.available and (await site.service.refresh_gauges()).owed == 0


async def test_site_is_degraded_when_the_queue_is_down(
    serve_site: ServeSite, cache: EmbeddedServer, queue: EmbeddedServer
) -> None:
    async with serve_site(cache_url=cache.url, queue_url=queue.url) as site:
        queue.kill()
        body = await ready(site)
        assert body["status"] == "degraded"
        assert [name for name, text in body["checks"].items() if text != "ok"] == ["queue", "worker"]
        assert str(queue.socket_path) not in str(body)
        assert (await site.send(served(new_user(), site.now_ms)))["invalidated"] is True


async def test_site_is_degraded_when_neither_cache_nor_queue_is_set(serve_site: ServeSite) -> None:
    async with serve_site(cache_url=None, queue_url=None) as site:
        body = await ready(site)
        assert body["status"] == "degraded"
        assert "PROFILES_QUEUE_URL" in body["checks"]["queue"]
        user = new_user()
        await site.send(served(user, site.now_ms))
        assert (await site.features(user))["tip_volume_30d"] == 1


@pytest.mark.slow
async def test_site_serves_reads_when_the_database_is_locked(own_site: Live) -> None:
    with closing(sqlite3.connect(own_site.service.settings.require_file(), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        body = await ready(own_site)
        assert body["checks"]["database"] == "ok"
        assert (await own_site.features(new_user()))["tip_volume_30d"] == 0
        other.execute("ROLLBACK")


async def test_site_is_unavailable_when_the_database_does_not_answer(
    own_site: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read(*_: object) -> None:
        raise StoreUnavailable("the database does not answer: disk I/O error at /secret/place")

    monkeypatch.setattr(own_site.service.database, "read", read)
    body = await ready(own_site, 503)
    assert body["status"] == "unavailable"
    assert body["checks"]["database"] == "it does not answer; nothing can be served"
    answer = await own_site.client.get("/readyz")
    assert answer.headers["retry-after"] == "1"
    assert "/secret/place" not in answer.text
    assert (await own_site.client.get("/metrics")).status_code == 200
