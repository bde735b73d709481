"""`GET /admin/data-quality`: the report, its refresh, and the users of each state."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.features.clock import DAY_MS
from app.stores.valkey.embedded import EmbeddedServer
from tests.integration.api.admin.test_users import put
from tests.support.audit import newest_entries
from tests.support.clock import no_pause
from tests.support.events import feedback, served
from tests.support.live import Live, new_user, paths, problem
from tests.support.registry import REGISTRY
from tests.support.site import ServeSite


async def quality(site: Live, query: str = "") -> dict[str, Any]:
    report: dict[str, Any] = await site.json(f"/admin/data-quality{query}")
    assert report.keys() == {
        "measured_at",
        "took_s",
        "eligible",
        "measured",
        "before_at",
        "eligible_before",
        "measured_before",
        "margin",
        "cache_answered",
        "features",
    }
    assert report["features"].keys() == set(REGISTRY.names)
    return report


async def test_quality_is_all_zero_when_no_user_is_eligible(own_site: Live) -> None:
    await own_site.send(served(new_user(), own_site.now_ms - 31 * DAY_MS))
    report = await quality(own_site)
    assert report["eligible"] == 0
    for figures in report["features"].values():
        drift = figures.pop("drift")
        assert (drift["psi"], drift["band"], drift["failed"]) == (None, None, 0)
        assert "the history begins at" in drift["why_not"]
        assert sum(part["now"] for part in drift["bins"]) == 0
        assert figures == {
            "eligible": 0,
            "measured": 0,
            "fresh": 0,
            "missing": 0,
            "stale": 0,
            "null_share": None,
            "intervals": {"fresh": None, "missing": None, "stale": None, "null": None},
            "ages_ms": {"p50": None, "p90": None, "p99": None, "max": None},
            "distribution": [],
        }


@pytest.mark.slow
async def test_counts_of_states_add_up_to_the_eligible_users(own_site: Live, cache_server: EmbeddedServer) -> None:
    site = own_site
    whole, part, none, old = (new_user() for _ in range(4))
    await site.send(
        *(served(user, site.now_ms - 1) for user in (whole, part, none)),
        feedback(whole, site.now_ms - 1, "completed"),
        served(old, site.now_ms - 40 * DAY_MS),
    )
    await site.features(whole)
    await site.features(old)
    await site.client.get(f"/profiles/{part}?features=tip_volume_30d,completion_rate_30d")
    await site.filled()
    await put(site, cache_server, part, "tip_volume_30d", seq=0)
    report = await quality(site)
    assert report["eligible"] == 3
    counts = {
        name: (figures["eligible"], figures["fresh"], figures["missing"], figures["stale"])
        for name, figures in report["features"].items()
    }
    assert counts == {
        "completion_rate_30d": (3, 2, 1, 0),
        "dismiss_rate_30d": (3, 1, 2, 0),
        "mean_dwell_ms_30d": (3, 1, 2, 0),
        "preferred_hour": (3, 1, 2, 0),
        "tip_volume_30d": (3, 1, 1, 1),
    }
    for figures in report["features"].values():
        live = figures["fresh"] + figures["stale"]
        assert figures["measured"] == 3
        assert figures["intervals"]["fresh"] == [figures["fresh"] / 3] * 2  # all users are measured: exact
        not_null = round(live * (1 - figures["null_share"]))
        assert sum(part["count"] for part in figures["distribution"]) == not_null
        ages = figures["ages_ms"]
        assert 0 <= ages["p50"] <= ages["p90"] <= ages["p99"] <= ages["max"] < 60_000
    assert report["features"]["completion_rate_30d"]["null_share"] == 0.5
    assert report["features"]["mean_dwell_ms_30d"]["null_share"] == 1
    assert report["features"]["tip_volume_30d"]["distribution"] == [
        {"value": 1, "count": 1},
        {"value": 77, "count": 1},
    ]


async def test_states_are_null_when_the_cache_is_down(site_without_cache: Live) -> None:
    site = site_without_cache
    await site.send(served(new_user(), site.now_ms), served(new_user(), site.now_ms))
    report = await quality(site)
    assert report["eligible"] == 2
    for figures in report["features"].values():
        assert (figures.pop("eligible"), figures.pop("measured")) == (2, 2)
        assert sum(part["now"] for part in figures.pop("drift")["bins"]) == 2  # values need no cache
        assert set(figures.values()) == {None}
    found = await behind(site, "feature=tip_volume_30d&state=missing")
    assert (found["users"], found["next_after"]) == (None, None)


async def test_figures_are_of_a_sample_when_users_are_many(own_site: Live) -> None:
    users = [new_user() for _ in range(60)]
    await own_site.send(*(served(user, own_site.now_ms - 1) for user in users))
    for user in users[:30]:
        await own_site.features(user)
    await own_site.filled()
    own_site.service.quality.sample = 20
    report = await quality(own_site)
    sizes = [report[name] for name in ("eligible", "measured", "eligible_before", "measured_before")]
    assert sizes == [60, 20, 0, 0]
    assert 0.1 < report["margin"] < 0.25
    figures = report["features"]["tip_volume_30d"]
    assert (figures["eligible"], figures["measured"]) == (60, 20)
    assert figures["fresh"] + figures["missing"] + figures["stale"] == 20
    for state in ("fresh", "missing", "stale"):
        low, high = figures["intervals"][state]
        assert 0 <= low <= figures[state] / 20 <= high <= 1
        assert high - low > 0.05
    listed = await behind(own_site, "feature=tip_volume_30d&state=fresh")
    assert len(listed["users"]) == 30  # of all eligible users


async def test_measurement_ends_when_the_client_disconnects(own_site: Live) -> None:
    measurement, measuring = own_site.service.quality, asyncio.Event()

    async def forever(_: float) -> None:
        measuring.set()
        await asyncio.Event().wait()

    await own_site.send(served(new_user(), own_site.now_ms))
    measurement.pause = forever
    _, writer = await asyncio.open_connection("127.0.0.1", own_site.port)
    writer.write(b"GET /admin/data-quality HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await measuring.wait()
    writer.close()
    await writer.wait_closed()
    measurement.pause = no_pause
    assert (await quality(own_site))["eligible"] == 1  # one measurement at a time


async def test_report_is_measured_anew_when_no_age_is_allowed(own_site: Live) -> None:
    site = own_site
    assert (await quality(site, "?max_age_s=3600"))["eligible"] == 0  # none is stored yet
    await site.send(served(new_user(), site.now_ms))
    run = await site.json("/admin/data-quality/refresh", "POST", 202)
    await site.service.quality.carry_out(run["id"], 60)
    await site.send(served(new_user(), site.now_ms))
    assert (await quality(site))["eligible"] == 2
    stored = await quality(site, "?max_age_s=60")
    assert stored["eligible"] == 1
    assert stored == await quality(site, "?max_age_s=3600")
    assert (await quality(site, "?max_age_s=0"))["eligible"] == 2


async def test_refresh_is_queued_and_audited(own_site: Live) -> None:
    site = own_site
    problem(await site.client.get("/admin/data-quality/refresh"), 404)
    answer = await site.client.post("/admin/data-quality/refresh")
    assert answer.status_code == 202
    run = answer.json()
    assert (run["state"], run["measured"], run["waiting_for"]) == ("queued", 0, "worker")  # no worker is there
    assert (await site.client.post("/admin/data-quality/refresh")).json() == run  # it is under way: not a second one
    await site.send(served(new_user(), site.now_ms))
    await site.service.quality.carry_out(run["id"], 60)
    ended = (await site.client.get("/admin/data-quality/refresh")).json()
    assert (ended["state"], ended["measured"], ended["waiting_for"]) == ("completed", 1, None)
    entries = await newest_entries(site.service.audit_trail, 5)
    assert {(entry.action, entry.subject) for entry in entries} == {("refresh data quality", "everyone")}
    assert [entry.outcome for entry in entries] == [
        f"report {run['id']}, which was active already",
        f"report {run['id']}",
    ]


async def test_refresh_waits_for_the_queue_when_it_is_down(serve_site: ServeSite, queue: EmbeddedServer) -> None:
    async with serve_site(queue_url=queue.url) as site:
        queue.kill()
        answer = await site.client.post("/admin/data-quality/refresh")
        assert answer.status_code == 202
        assert (answer.json()["state"], answer.json()["waiting_for"]) == ("queued", "queue")


async def behind(site: Live, query: str) -> dict[str, Any]:
    found: dict[str, Any] = await site.json(f"/admin/data-quality/users?{query}")
    return found


@pytest.mark.slow
async def test_users_of_a_state_are_listed_page_by_page(own_site: Live, cache_server: EmbeddedServer) -> None:
    site = own_site
    users = sorted(new_user() for _ in range(5))
    await site.send(*(served(user, site.now_ms - 1) for user in users))
    for user in users[:3]:
        await site.features(user)
    await site.filled()
    await put(site, cache_server, users[4], "tip_volume_30d", seq=0)
    first = await behind(site, "feature=tip_volume_30d&state=fresh&limit=2")
    assert [user["user_id"] for user in first["users"]] == users[:2]
    assert first["next_after"] == users[1]
    second = await behind(site, f"feature=tip_volume_30d&state=fresh&limit=2&after={first['next_after']}")
    assert ([user["user_id"] for user in second["users"]], second["next_after"]) == (users[2:3], None)
    assert (second["users"][0]["value"], second["users"][0]["state"]) == (1, "fresh")
    missing = await behind(site, "feature=tip_volume_30d&state=missing")
    assert missing["users"] == [
        {"user_id": users[3], "state": "missing", "value": None, "computed_at": None, "expires_at": None}
    ]
    stale = await behind(site, "feature=tip_volume_30d&state=stale")
    assert [(user["user_id"], user["value"]) for user in stale["users"]] == [(users[4], 77)]
    nulls = await behind(site, "feature=completion_rate_30d&state=null")
    assert [user["user_id"] for user in nulls["users"]] == users[:3]
    assert (nulls["scanned"], nulls["feature"], nulls["state"]) == (5, "completion_rate_30d", "null")


async def test_query_is_refused_when_it_is_invalid(site: Live) -> None:
    ages = ("-1", "x", "", "1.5", "null", "NULL", "99999999999999999999")
    feature = "feature=tip_volume_30d"
    for query, place in (
        *((f"?max_age_s={age}", "max_age_s") for age in ages),
        ("/users?state=fresh", "feature"),
        ("/users?state=fresh&feature=nope", "feature"),
        (f"/users?{feature}", "state"),
        (f"/users?{feature}&state=rotten", "state"),
        (f"/users?{feature}&state=fresh&limit=0", "limit"),
        (f"/users?{feature}&state=fresh&sought=fresh", "sought"),
    ):
        assert paths(problem(await site.client.get(f"/admin/data-quality{query}"), 400)) == [place], query
