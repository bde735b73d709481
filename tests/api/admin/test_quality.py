"""`GET /admin/data-quality`: measured figures that tie out."""

from __future__ import annotations

from typing import Any

import pytest

from app.features.clock import DAY_MS
from app.features.definitions import REGISTRY
from app.stores.valkey.embedded import EmbeddedServer
from tests.api.admin.test_users import put
from tests.api.conftest import ServeSite
from tests.support.events import feedback, served
from tests.support.live import Live, new_user
from tests.support.servers import VALKEY, StartServer

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def quality(site: Live) -> dict[str, Any]:
    """The report."""
    answer = await site.client.get("/admin/data-quality")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    report: dict[str, Any] = answer.json()
    assert report.keys() == {"measured_at", "eligible", "features"}
    assert report["features"].keys() == set(REGISTRY.names)
    return report


async def test_quality_is_all_zero_when_nobody_is_eligible(own_site: Live) -> None:
    await own_site.send(served(new_user(), own_site.now_ms - 31 * DAY_MS))
    report = await quality(own_site)
    assert report["eligible"] == 0
    for figures in report["features"].values():
        assert figures == {
            "eligible": 0,
            "fresh": 0,
            "missing": 0,
            "stale": 0,
            "null_share": None,
            "ages_ms": {"p50": None, "p90": None, "p99": None, "max": None},
            "distribution": [],
        }


async def test_quality_ties_out_when_values_are_fresh_missing_and_stale(
    own_site: Live, cache_server: EmbeddedServer
) -> None:
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


async def test_quality_is_null_but_for_eligible_when_the_cache_is_away(
    serve_site: ServeSite, start_server: StartServer
) -> None:
    cache = start_server(VALKEY)
    async with serve_site(cache_url=cache.url, cache_timeout_ms=100) as site:
        await site.send(served(new_user(), site.now_ms), served(new_user(), site.now_ms))
        cache.kill()
        report = await quality(site)
    assert report["eligible"] == 2
    for figures in report["features"].values():
        assert figures.pop("eligible") == 2
        assert set(figures.values()) == {None}
