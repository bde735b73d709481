"""A service that only serves profiles (`PROFILES_SCORING=0`): no decisions, no roll-out, everything else."""

import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.events import feedback, served
from tests.support.live import JSON, Live, new_user, problem
from tests.support.site import ServeSite

ABSENT = {
    "/score": "post",
    "/decisions/{decision_id}": "get",
    "/decisions": "get",
    "/admin/decisions": "get",
    "/admin/decisions/{decision_id}": "get",
    "/admin/rollout": "get",
    "/admin/rollout/ramp": "post",
    "/admin/rollout/promote": "post",
    "/admin/rollout/rollback": "post",
}
HTML = {"Accept": "text/html"}
CANDIDATE = {"id": "t-1", "features": {"is_overdue": True, "task_age_days": 1, "priority": 1}}
SCORE = {"user_id": "ann", "candidates": [CANDIDATE]}
SELECT_WAITING = "SELECT seq FROM outbox"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def unscored(serve_site: ServeSite) -> AsyncIterator[Live]:
    async with serve_site(scoring=False) as served_site:
        yield served_site


@pytest.mark.slow
async def test_routes_of_scoring_are_absent(unscored: Live, site: Live) -> None:
    for path, method in ABSENT.items():
        problem(await unscored.client.request(method, path, content=json.dumps(SCORE), headers=JSON), 404)
    without, whole = [(await at.client.get("/schema/openapi.json")).json() for at in (unscored, site)]
    assert whole["paths"].keys() - without["paths"].keys() == ABSENT.keys()
    missing = whole["components"]["schemas"].keys() - without["components"]["schemas"].keys()
    assert {"ScoreRequest", "ScoreAnswer", "DecisionAnswer", "RolloutStatus"} <= missing


@pytest.mark.slow
async def test_pages_of_scoring_are_absent_from_the_navigation(unscored: Live, site: Live) -> None:
    for path in ("/admin", "/admin/features", "/admin/nowhere", "/admin/users/ann"):
        pages = [(await at.client.get(path, headers=HTML)).text for at in (unscored, site)]
        for address in ("/admin/rollout", "/admin/decisions"):
            assert [address in page for page in pages] == [False, True], (path, address)
        assert "/admin/rebuilds" in pages[0]
    for path in ("/admin/rollout", "/admin/decisions"):
        assert (await unscored.client.get(path, headers=HTML)).status_code == 404


async def test_profiles_tips_and_erasure_work_without_scoring(unscored: Live) -> None:
    user = new_user()
    await unscored.send(served(user, unscored.now_ms))
    assert (await unscored.features(user))["tip_volume_30d"] == 1
    task = {"id": "t", "title": "Renew the passport"}
    written = await unscored.json("/generate", "POST", json={"task": task, "user_id": user})
    assert written["source"] == "template"
    overview = await unscored.json("/admin")
    assert "rollout" not in {finding["subject"] for finding in overview["findings"]}
    assert "profiles_rollout_stage{" not in (await unscored.client.get("/metrics")).text
    assert (await unscored.client.delete(f"/admin/users/{user}")).status_code == 204
    assert (await unscored.features(user))["tip_volume_30d"] == 0


async def test_events_are_consumed_and_teach_nothing_when_scoring_is_off(own_site: Live, serve_site: ServeSite) -> None:
    decision = await own_site.json("/score", "POST", json=SCORE)
    async with serve_site(database=own_site.service.settings.database, scoring=False) as off:
        sent = {"tip_id": decision["chosen_id"], "decision_id": decision["decision_id"]}
        await off.send(served("ann", off.now_ms, **sent), feedback("ann", off.now_ms, "completed", **sent))
        waiting = [seq for (seq,) in await off.service.database.rows(SELECT_WAITING)]
        assert await off.service.consumer.consume(waiting) == 2
        assert await off.service.database.rows(SELECT_WAITING) == []
        assert await off.service.logged_profiles.by_id([decision["decision_id"]])
    explained = await own_site.json(f"/decisions/{decision['decision_id']}")
    assert explained["outcome"]["state"] == "open"
    assert (await own_site.service.bandit.states.growth()).users == 0
