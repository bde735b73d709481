"""`GET /admin/users/{user_id}`: cached against computed values, and the state of each event."""

import json
import signal
from functools import partial
from typing import Any
from urllib.parse import quote

import pytest

from app.features.clock import rfc3339
from app.features.events import FEEDBACK
from app.stores.valkey.embedded import EmbeddedServer
from app.stores.valkey.single_server import TRIP_AFTER
from tests.integration.api.admin.test_users import put
from tests.support.events import feedback, served
from tests.support.live import Live, new_user
from tests.support.registry import REGISTRY
from tests.support.site import ServeSite
from tests.support.waiting import PATIENCE_S

pytestmark = pytest.mark.both_engines

NASTY = ["a?b=c&d", "100%", "%2F", "#top", "\"'><script>alert(1)<\\script>", "é 🎯", "+ +", "{x}", "a;b,c"]


async def look(site: Live, user: str, part: str = "") -> dict[str, Any]:
    found: dict[str, Any] = await site.json(f"/admin/users/{quote(user, safe='')}{part}")
    return found


@pytest.mark.slow
async def test_cell_shows_the_cached_and_the_computed_value(site: Live, cache_server: EmbeddedServer) -> None:
    user = new_user()
    seq = 10**9
    await site.send(served(user, site.now_ms))
    await put(site, cache_server, user, "tip_volume_30d", seq=seq)
    cells = (await look(site, user))["features"]
    missing = cells["completion_rate_30d"]
    assert (missing["state"], missing["holds"]) == ("missing", "nothing")
    assert (missing["held"], missing["difference"]) == (None, None)
    cell = cells["tip_volume_30d"]
    assert (cell["value"], cell["recomputed"], cell["state"], cell["holds"]) == (77, 1, "fresh", "value")
    assert cell["difference"] == "unexplained"
    assert cell["held"].keys() == {"value", "computed_at", "expires_at", "ttl_left_s", "seq"}
    assert (cell["held"]["value"], cell["held"]["seq"]) == (77, seq)
    assert 50 < cell["held"]["ttl_left_s"] <= 60
    for entry in REGISTRY:
        assert cells[entry.name]["description"] == entry.description
        assert cells[entry.name]["ttl_s"] == entry.ttl.total_seconds()
        assert cells[entry.name]["error"] is None


@pytest.mark.slow
async def test_difference_is_unexplained_when_a_value_is_wrong(site: Live, cache_server: EmbeddedServer) -> None:
    user = new_user()
    await site.send(served(user, site.now_ms))
    (event,) = (await look(site, user))["events"]
    await site.filled()
    await put(site, cache_server, user, "tip_volume_30d", seq=event["seq"])
    cells = (await look(site, user))["features"]
    assert cells["tip_volume_30d"]["difference"] == "unexplained"
    assert cells["completion_rate_30d"]["difference"] == "none"


async def test_event_has_its_state_and_times(own_site: Live) -> None:
    site, user = own_site, new_user()
    ahead_ms = site.now_ms + 120_000
    await site.send(served(user, site.now_ms - 5_000))
    await site.send(feedback(user, ahead_ms))
    await site.send(feedback(user, site.now_ms))
    first, second, third = (item.seq for item in await site.service.consumer.log.unconsumed(site.now_ms + 1, 10))
    await site.service.consumer.log.mark_consumed([first])
    await site.service.dead_letters.failed(third, "it failed", "Traceback", site.now_ms, 1)
    newest, corrected, oldest = (await look(site, user))["events"]
    assert [item["seq"] for item in (newest, corrected, oldest)] == [third, second, first]
    assert [item["state"] for item in (newest, corrected, oldest)] == ["dead letter", "waiting", "consumed"]
    assert (newest["attempts"], newest["dead_letter"]) == (1, 1)
    assert (oldest["invalidates"], oldest["dead_letter"]) == (["tip_volume_30d"], None)
    assert newest["invalidates"] == [entry.name for entry in REGISTRY if FEEDBACK in entry.invalidated_by]
    assert 5_000 <= oldest["arrival_lag_ms"] < 60_000
    assert not oldest["time_corrected"]
    assert (corrected["time_corrected"], corrected["state"]) == (True, "waiting")
    assert corrected["counted_at"] == corrected["received_at"] < rfc3339(ahead_ms)
    assert corrected["arrival_lag_ms"] < 0


async def test_inspection_waits_for_few_timeouts_when_the_cache_hangs(
    serve_site: ServeSite, cache: EmbeddedServer
) -> None:
    async with serve_site(cache_url=cache.url, cache_timeout_ms=100) as site:
        user = new_user()
        await site.send(served(user, site.now_ms))
        timeouts = partial(
            site.service.metrics.collectors.get_sample_value, "profiles_cache_errors_total", {"kind": "silent"}
        )
        before = timeouts() or 0
        cache.signal(signal.SIGSTOP)
        try:
            answer = await site.client.get(f"/admin/users/{user}", timeout=PATIENCE_S)
        finally:
            cache.signal(signal.SIGCONT)
        assert (timeouts() or 0) - before <= TRIP_AFTER
        cell = answer.json()["features"]["tip_volume_30d"]
        assert (cell["value"], cell["recomputed"], cell["origin"]) == (1, 1, "computed")
        assert (cell["freshness"], cell["state"], cell["holds"], cell["held"]) == (None, "degraded", None, None)


async def test_cells_are_degraded_when_an_invalidation_is_owed(serve_site: ServeSite, cache: EmbeddedServer) -> None:
    async with serve_site(cache_url=cache.url) as site:
        user = new_user()
        await site.send(served(user, site.now_ms))
        await site.features(user)
        await site.filled()
        cache.kill()
        await site.send(served(user, site.now_ms))
        cell = (await look(site, user))["features"]["tip_volume_30d"]
        assert (cell["value"], cell["state"]) == (2, "degraded")


async def test_user_is_found_when_its_id_needs_escaping(site: Live) -> None:
    for nasty in NASTY:
        user = new_user(nasty)
        await site.send(served(user, site.now_ms, tip_id=nasty))
        body = await look(site, user)
        assert (body["user_id"], body["events"][0]["event"]["tip_id"]) == (user, nasty)
        assert (await look(site, user, "/development"))["user_id"] == user
        assert (await look(site, user, "/erase"))["views"] == 1, nasty


async def test_inspection_is_small_when_the_user_has_thousands_of_events(site: Live) -> None:
    user = new_user()
    now_ms = site.now_ms
    for start in range(0, 2_000, 1_000):
        await site.send(*(served(user, now_ms - number * 250_000) for number in range(start, start + 1_000)))
    body = await look(site, user)
    assert body["features"]["tip_volume_30d"]["recomputed"] == 2_000
    assert len(body["events"]) == 50
    assert len(json.dumps(body)) < 60_000
