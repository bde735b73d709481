"""A service with the registry of an operator: answers, OpenAPI document, and a feature that fails."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from app.features.clock import DAY_MS, rfc3339
from app.features.events import TipFeedback
from tests.support.events import feedback, served
from tests.support.live import Live, new_user
from tests.support.registry import own_entry, own_registry
from tests.support.site import ServeSite
from tests.support.waiting import eventually_async

# Ends quickly for a user with up to three events, and not at all with more.
RUNAWAY = """
    WITH RECURSIVE n (i) AS (
        SELECT 1 UNION ALL
        SELECT i + 1 FROM n WHERE i < (SELECT CASE WHEN COUNT(*) > 3 THEN 9e15 ELSE 3 END FROM feedback)
    )
    SELECT user_id, (SELECT COUNT(*) FROM n) AS value FROM feedback GROUP BY user_id
"""
ENTRIES = (
    own_entry("seen_week", days=7),
    own_entry("seen_quarter", days=90),
    own_entry("total_dwell", "SELECT user_id, SUM(dwell_ms) AS value FROM feedback GROUP BY user_id", dtype="float"),
    own_entry("latest", "SELECT user_id, MAX(tip_id) AS value FROM views GROUP BY user_id", dtype="str"),
    own_entry("runaway", RUNAWAY),
)


@pytest_asyncio.fixture(loop_scope="session")
async def own(serve_site: ServeSite, tmp_path: Path) -> AsyncIterator[Live]:
    source = own_registry(tmp_path / "features.py", *ENTRIES)
    async with serve_site(features=source, statement_timeout_ms=300) as site:
        yield site


def reactions(site: Live, user_id: str, count: int) -> list[TipFeedback]:
    return [feedback(user_id, site.now_ms - 1_000, dwell_ms=1) for _ in range(count)]


@pytest.mark.slow
async def test_each_feature_has_its_own_window(own: Live) -> None:
    user = new_user("ann")
    days = (1, 6, 8, 60, 95)
    await own.send(*(served(user, own.now_ms - day * DAY_MS, tip_id=f"tip-{day}") for day in days))
    await own.send(*reactions(own, user, 3))
    expected = {"seen_week": 2, "seen_quarter": 4, "total_dwell": 3.0, "latest": "tip-8", "runaway": 3}
    assert await own.features(user) == expected
    answer = await own.client.get(f"/profiles/{user}?features=total_dwell")
    assert b'"total_dwell":3.0' in answer.content  # an int of the SQL, served as the float that is declared
    document = (await own.client.get("/schema/openapi.json")).json()
    schemas = document["components"]["schemas"]
    assert list(schemas["ProfileFeatures"]["properties"]) == list(expected)
    for kind in ("ScoreRequest", "GenerateRequest"):
        assert "#/components/schemas/ProfileFeatures'" in str(schemas[kind]["properties"]["profile_features"])
    assert not [name for name in schemas if name.endswith("_ProfileFeatures")]


async def test_score_and_generate_work_when_their_features_are_missing(own: Live) -> None:
    candidates = [{"id": "t", "features": {"is_overdue": True, "task_age_days": 1, "priority": 1}}]
    user = new_user("ann")
    for sent in ({}, {"profile_features": {"seen_week": 3, "latest": "x"}}, {"profile_features": None}):
        answer = await own.client.post("/score", json={"user_id": user, "candidates": candidates, **sent})
        assert answer.status_code == 200, answer.text
        asked = {"task": {"id": "t", "title": "Pay"}, "user_id": user, **sent}
        assert (await own.client.post("/generate", json=asked)).status_code == 200
    wrong = {"user_id": user, "candidates": candidates, "profile_features": {"seen_week": "three"}}
    answer = await own.client.post("/score", json=wrong)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["path"] == "profile_features.seen_week"


@pytest.mark.slow
async def test_runaway_feature_is_null_and_delays_no_other(own: Live) -> None:
    user, other = new_user("ann"), new_user("bob")
    await own.send(*reactions(own, user, 4), *(served(name, own.now_ms - 1_000) for name in (user, other)))
    found = (await own.json(f"/profiles/{user}?detail=true"))["features"]
    assert (found["runaway"]["value"], found["seen_week"]["value"]) == (None, 1)
    assert found["runaway"]["error"] == "the SQL took longer than 300 ms for one user"
    for number in range(40):
        assert (await own.features(f"{other}-{number}"))["runaway"] is None
        ready = await own.client.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
        assert "runaway: the SQL took longer than 300 ms" in ready.json()["checks"]["features"]
    seen = own.service.metrics.collectors.get_sample_value
    assert (seen("profiles_computation_errors_total", {"feature": "runaway"}) or 0) < 20, "most reads did not run it"
    (entry,) = (item for item in (await own.client.get("/features")).json()["features"] if item["name"] == "runaway")
    assert (entry["state"], entry["reason"]) == ("failing", "the SQL took longer than 300 ms for one user")


@pytest.mark.slow
async def test_feature_is_served_again_when_its_facts_are_repaired(own: Live) -> None:
    user, other = new_user("ann"), new_user("bob")
    await own.send(*reactions(own, user, 4))
    assert (await own.features(user))["runaway"] is None
    assert (await own.client.delete(f"/admin/users/{user}")).status_code == 204
    await own.send(*reactions(own, other, 1))

    async def back() -> bool:
        ready = (await own.client.get("/readyz")).json()["checks"]["features"]
        return bool(ready == "ok" and (await own.features(other))["runaway"] == 3)

    await eventually_async(back)


@pytest.mark.slow
async def test_history_names_the_features_that_failed(own: Live) -> None:
    user = new_user("ann")
    await own.send(*reactions(own, user, 4))
    asked = {"rows": [{"user_id": user, "as_of": rfc3339(own.now_ms)}]}
    answer = (await own.client.post("/profiles/history", json=asked)).json()
    assert answer["rows"][0]["features"]["total_dwell"] == 4.0
    assert answer["rows"][0]["features"]["runaway"] is None
    assert answer["failed"] == {"runaway": "the SQL took longer than 300 ms for one user"}


async def test_users_count_as_eligible_over_the_longest_window(own: Live) -> None:
    user = new_user("quarter")
    await own.send(served(user, own.now_ms - 80 * DAY_MS), served(new_user("long-ago"), own.now_ms - 95 * DAY_MS))
    quality = (await own.client.get("/admin/data-quality")).json()
    assert quality["eligible"] == 1
    for chosen, total in ((None, 1), (["seen_week"], 0)):
        rebuild = await own.client.post("/admin/rebuilds", json={"scope": "all", "features": chosen})
        assert rebuild.json()["total"] == total, rebuild.text
        assert (await own.client.delete(f"/admin/rebuilds/{rebuild.json()['id']}")).status_code == 200


@pytest.mark.slow
async def test_data_quality_shows_failed_features(own: Live) -> None:
    user = new_user("ann")
    await own.send(*reactions(own, user, 4))
    await own.features(user)
    drift = (await own.client.get("/admin/data-quality")).json()["features"]["runaway"]["drift"]
    assert (drift["band"], drift["psi"]) == ("failed", None)
    assert drift["why_not"].endswith("the SQL took longer than 300 ms for one user")
    sound = (await own.client.get("/admin/data-quality")).json()["features"]["seen_week"]["drift"]
    assert sound["band"] is None
