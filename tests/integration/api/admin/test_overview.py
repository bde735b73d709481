"""`GET /admin`: states, figures and findings, also when components do not answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.api.admin import overview
from app.api.pages.templating import NAVIGATION
from app.bootstrap.health import sampler
from app.errors import StoreUnavailable
from app.features.clock import DAY_MS
from app.operations.component_states import COMPONENTS
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.events import admitted, payload, served
from tests.support.live import API_KEYS, KEYS, Live, new_user, problem
from tests.support.site import ServeSite


async def view(site: Live) -> dict[str, Any]:
    body: dict[str, Any] = await site.json("/admin")
    assert [item["name"] for item in body["components"]] == list(COMPONENTS)
    return body


def states(body: dict[str, Any]) -> dict[str, str]:
    return {item["name"]: item["state"] for item in body["components"]}


async def test_overview_shows_the_traffic_of_every_process(
    serve_site: ServeSite, cache: EmbeddedServer, queue: EmbeddedServer
) -> None:
    async with serve_site(cache_url=cache.url, queue_url=queue.url) as site:
        own = sampler(site.service, "api")
        user = new_user()
        await site.send(served(user, site.now_ms))
        await site.features(user)
        await site.filled()
        await site.features(user)
        await site.client.get("/metrics")
        await site.client.get("/admin")
        await own.sample()
        body = await view(site)
    # A busy machine may be slow, which is a finding.
    assert [found for found in body["findings"] if found["subject"] not in ("latency_p99_ms", "lag_p99_ms")] == []
    assert set(states(body).values()) == {"ok"}
    assert body["sampled"] is True
    figures = body["figures"]
    assert figures["hit_ratio"]["now"] == figures["hit_ratio"]["hour"] == 0.5
    assert figures["request_rate"]["now"] > 0
    assert 0 < figures["latency_p50_ms"]["now"] <= figures["latency_p99_ms"]["now"]
    assert figures["lag_p50_ms"]["now"] > 0
    assert figures["outbox"]["now"] == 1
    assert figures["dead_letters"] == {**figures["dead_letters"], "unit": "count", "now": 0, "hour": 0}
    assert figures["hit_ratio"]["series"][-1] == 0.5 or figures["hit_ratio"]["series"][-2] == 0.5
    assert {len(item["series"]) for item in figures.values()} == {len(body["slots"])} == {60}
    (process,) = body["processes"]
    assert (process["role"], process["stopped"]) == ("api", False)


async def test_figures_are_empty_when_there_is_no_sample(own_site: Live) -> None:
    body = await view(own_site)
    assert body["sampled"] is False
    assert body["processes"] == []
    figures = body["figures"]
    assert {name for name, item in figures.items() if item["now"] is not None} <= {
        "queue_depth",
        "outbox",
        "outbox_age_s",
        "dead_letters",
        "unreadable",
        "owed",
        "events_ahead",
    }
    assert figures["hit_ratio"]["series"] == [None] * 60
    assert states(body)["database"] == "ok"


@pytest.mark.slow
async def test_overview_shows_an_outage_and_its_start(
    serve_site: ServeSite, cache: EmbeddedServer, queue: EmbeddedServer
) -> None:
    async with serve_site(cache_url=cache.url, queue_url=queue.url) as site:
        own = sampler(site.service, "api")
        await own.sample()
        cache.kill()
        queue.kill()
        body = await view(site)
        assert states(body) == {
            "service": "degraded",
            "cache": "down",
            "queue": "down",
            "worker": "unknown",
            "database": "ok",
            "features": "ok",
        }
        assert body["state"] == "degraded"
        assert [item["subject"] for item in body["findings"]] == ["cache", "queue"]
        await own.sample()
        first, second = await view(site), await view(site)
        since = {item["name"]: item["since"] for item in first["components"]}
        assert since == {item["name"]: item["since"] for item in second["components"]}
        assert since["cache"] < first["measured_at"]
        assert str(cache.socket_path) not in str(first)


@pytest.mark.slow
async def test_overview_links_to_the_dead_letters(own_site: Live) -> None:
    await sampler(own_site.service, "api").sample()
    await own_site.service.dead_letters.bury_payloads([("1", "no event")], own_site.now_ms)
    body = await view(own_site)
    (finding,) = (item for item in body["findings"] if item["subject"] == "dead_letters")
    assert finding["path"] == "/admin/dead-letters"


async def test_overview_answers_when_the_database_does_not(own_site: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    async def read(*_: object) -> None:
        raise StoreUnavailable("the database does not answer: disk I/O error at /secret/place")

    monkeypatch.setattr(own_site.service.database, "read", read)
    body = await view(own_site)
    assert body["state"] == "down"
    assert states(body)["service"] == states(body)["database"] == "down"
    assert "/secret/place" not in str(body)


async def test_overview_answers_when_nothing_answers(own_site: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    async def read(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(overview, "TIMEOUT_S", 0.05)
    monkeypatch.setattr(own_site.service.database, "read", read)
    body = await view(own_site)
    assert body["state"] == "unknown"
    assert set(states(body).values()) == {"unknown"}


async def test_findings_link_to_pages_of_the_navigation() -> None:
    assert set(overview.PLACES.values()) <= {address for address, _ in NAVIGATION}


async def test_overview_reports_a_first_pruning_that_waits(serve_site: ServeSite) -> None:
    async with serve_site() as site:
        old_ms = site.now_ms - 200 * DAY_MS
        await site.service.consumer.log.append([[admitted(served(new_user(), old_ms))]])
        found = {item["subject"]: item for item in (await view(site))["findings"]}
        assert found["retention"]["text"].startswith("Old events are not deleted")
        assert "profiles prune --confirm" in found["retention"]["advice"]


async def test_overview_reports_unknown_decision_ids_with_the_key(serve_site: ServeSite) -> None:
    async with serve_site(api_keys=API_KEYS) as site:
        events = [payload(served(new_user(), site.now_ms, decision_id="no-such-decision")) for _ in range(2)]
        answer = await site.client.post("/events", json=events, headers={"X-API-Key": KEYS["writer"]})
        assert answer.status_code == 202
        assert await site.service.consumer.consume([1, 2]) == 2
        admin = {"X-API-Key": KEYS["admin"]}
        found = {item["subject"]: item for item in (await site.client.get("/admin", headers=admin)).json()["findings"]}
        assert found["decision_ids"]["text"] == "2 events sent by the key writer named no decision of the user."
        assert "the decision_id that /score returned" in found["decision_ids"]["advice"]


async def test_wrong_period_is_answered_with_the_allowed_ones(site: Live) -> None:
    body = problem(await site.client.get("/admin?period=week"), 400)
    assert body["errors"] == [{"path": "period", "detail": "must be hour, day or month"}]
