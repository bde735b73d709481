"""Rebuilds of many users. The test runs them as a worker does."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.support.audit import newest_entries
from tests.support.events import served
from tests.support.live import Live, assert_refused, new_user, problem
from tests.support.registry import REGISTRY


async def start(site: Live, body: dict[str, Any]) -> dict[str, Any]:
    run: dict[str, Any] = await site.json("/admin/rebuilds", "POST", 202, json=body)
    return run


async def look(site: Live, run_id: str) -> dict[str, Any]:
    run: dict[str, Any] = await site.json(f"/admin/rebuilds/{run_id}")
    return run


@pytest_asyncio.fixture(loop_scope="session")
async def users(site: Live) -> AsyncIterator[list[str]]:
    users = [new_user() for _ in range(3)]
    await site.send(*(served(user, site.now_ms) for user in users))
    yield users


async def test_rebuild_is_queued_until_a_worker_runs_it(site: Live, users: list[str]) -> None:
    run = await start(site, {"user_ids": [*users, users[0]], "features": ["tip_volume_30d", "preferred_hour"]})
    assert run["id"]
    assert run["created_at"].endswith("Z")
    assert {name: value for name, value in run.items() if name not in ("id", "created_at", "scope")} == {
        "features": ["preferred_hour", "tip_volume_30d"],
        "state": "queued",
        "done": 0,
        "total": 3,
        "rate_per_s": None,
        "eta_s": None,
        "requested_by": "anyone",
        "started_at": None,
        "finished_at": None,
        "error": None,
        "user_count": 3,
        "took_s": None,
    }
    assert run["scope"].startswith("users:")
    assert await look(site, run["id"]) == run


async def test_rebuild_caches_every_feature(site: Live, users: list[str]) -> None:
    run = await start(site, {"user_ids": users})
    assert run["features"] == list(REGISTRY.names)
    assert await site.service.rebuild_runner.run(run["id"], budget_s=30)
    ended = await look(site, run["id"])
    assert (ended["state"], ended["done"], ended["total"], ended["eta_s"]) == ("completed", 3, 3, None)
    assert ended["rate_per_s"] > 0
    assert run["created_at"] <= ended["started_at"] <= ended["finished_at"]
    details = (await site.client.get(f"/profiles/{users[1]}?detail=true")).json()["features"]
    assert {cell["origin"] for cell in details.values()} == {"cache"}
    assert details["tip_volume_30d"]["value"] == 1


async def test_rebuild_conflicts_when_one_of_the_same_scope_is_active(site: Live, users: list[str]) -> None:
    run = await start(site, {"user_ids": users})
    again = await site.client.post("/admin/rebuilds", json={"user_ids": users[::-1], "features": ["tip_volume_30d"]})
    assert run["id"] in problem(again, 409)["detail"]
    await start(site, {"user_ids": users[:2]})
    await site.client.delete(f"/admin/rebuilds/{run['id']}")
    assert (await start(site, {"user_ids": users}))["id"] != run["id"]


async def test_rebuild_of_all_covers_the_eligible_users(own_site: Live) -> None:
    users = [new_user() for _ in range(3)]
    await own_site.send(*(served(user, own_site.now_ms) for user in users))
    run = await start(own_site, {"scope": "all"})
    assert (run["scope"], run["total"]) == ("all", 3)
    problem(await own_site.client.post("/admin/rebuilds", json={"scope": "all"}), 409)
    await own_site.service.rebuild_runner.run(run["id"], budget_s=30)
    assert (await look(own_site, run["id"]))["done"] == 3
    await start(own_site, {"scope": "all", "features": ["tip_volume_30d"]})


async def test_rebuild_has_a_rate_when_it_is_running(site: Live, users: list[str]) -> None:
    run = await start(site, {"user_ids": users})
    part = await site.service.rebuild_runs.claim(run["id"], "", "0003", site.now_ms)
    assert part is not None
    await site.service.rebuild_runs.advance(part, 1, "0001", site.now_ms)
    running = await look(site, run["id"])
    assert (running["state"], running["done"]) == ("running", 1)
    assert running["rate_per_s"] > 0
    assert running["eta_s"] >= 0


async def test_rebuild_stops_when_it_is_cancelled(site: Live, users: list[str]) -> None:
    run = await start(site, {"user_ids": users})
    answer = await site.client.delete(f"/admin/rebuilds/{run['id']}")
    assert answer.status_code == 200
    assert answer.json()["state"] == "cancelled"
    assert await site.service.rebuild_runner.run(run["id"], budget_s=30)
    ended = await look(site, run["id"])
    assert (ended["state"], ended["done"]) == ("cancelled", 0)
    assert "cancelled" in problem(await site.client.delete(f"/admin/rebuilds/{run['id']}"), 409)["detail"]


async def test_rebuilds_are_listed_newest_first(own_site: Live) -> None:
    runs = [(await start(own_site, {"user_ids": [new_user()]}))["id"] for _ in range(3)]
    listed = (await own_site.client.get("/admin/rebuilds")).json()
    assert listed.keys() == {"rebuilds"}
    times = [run["created_at"] for run in listed["rebuilds"]]
    assert times == sorted(times, reverse=True)
    assert {run["id"] for run in listed["rebuilds"]} == set(runs)


async def test_rebuild_is_not_found_when_it_does_not_exist(site: Live) -> None:
    for run_id in ("nope", "%00", "🎯", "x" * 1_000, "%2E%2E", "%2e"):
        for method in ("GET", "DELETE"):
            problem(await site.client.request(method, f"/admin/rebuilds/{run_id}"), 404)


async def test_rebuild_is_refused_when_its_body_is_invalid(site: Live) -> None:
    bodies: list[tuple[object, str]] = [
        *(({}, "$"), ([], "$"), ({"scope": None}, "$"), ({"scope": "all", "user_ids": ["u"]}, "$")),
        ({"scope": "some"}, "scope"),
        *(({"user_ids": ids}, "user_ids") for ids in ([], ["u"] * 1_001)),
        ({"user_ids": ["u", "a/b"]}, "user_ids[1]"),
        *(({"user_ids": ["u"], "features": names}, "features") for names in (["nope"], [])),
        ({"user_ids": ["u"], "when": "now"}, "when"),
    ]
    await assert_refused(site, "/admin/rebuilds", bodies)
    unknown = problem(await site.client.post("/admin/rebuilds", json={"scope": "ALL"}), 422)
    assert '"all"' in unknown["errors"][0]["detail"]


async def test_changes_of_rebuilds_and_their_refusals_are_audited(own_site: Live) -> None:
    run = await start(own_site, {"user_ids": ["u"]})
    problem(await own_site.client.post("/admin/rebuilds", json={"user_ids": ["u"]}), 409)
    await own_site.client.delete(f"/admin/rebuilds/{run['id']}")
    problem(await own_site.client.delete(f"/admin/rebuilds/{run['id']}"), 409)
    entries = await newest_entries(own_site.service.audit_trail, 10)
    assert {entry.actor for entry in entries} == {"anyone"}
    assert {entry.subject for entry in entries if entry.action == "start rebuild"} == {run["scope"]}
    assert [(entry.action, entry.outcome) for entry in entries] == [
        ("cancel rebuild", f"refused: rebuild {run['id']} has ended: it is cancelled"),
        ("cancel rebuild", run["id"]),
        ("start rebuild", f"refused: rebuild {run['id']} of the same scope is queued, at 0 of 1"),
        ("start rebuild", run["id"]),
    ]


async def test_rebuild_resumes_when_its_worker_is_restarted(own_site: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.profiles.rebuild.CHUNK", 2)
    users = sorted(new_user() for _ in range(5))
    await own_site.send(*(served(user, own_site.now_ms) for user in users))
    run = await start(own_site, {"scope": "all"})
    # One chunk, then the worker stops.
    assert await own_site.service.rebuild_runner.run(run["id"], budget_s=-1) is False
    halfway = await look(own_site, run["id"])
    assert (halfway["state"], halfway["done"], halfway["started_at"] is None) == ("running", 2, False)
    assert await own_site.service.rebuild_runs.active() == [run["id"]]
    assert await own_site.service.rebuild_runner.run(run["id"], budget_s=30)
    ended = await look(own_site, run["id"])
    assert (ended["state"], ended["done"], ended["total"]) == ("completed", 5, 5)
    assert ended["started_at"] == halfway["started_at"]
    assert ended["took_s"] >= 0


async def test_rebuild_took_no_negative_time_when_clocks_differ(site: Live, users: list[str]) -> None:
    run, runs = await start(site, {"user_ids": users}), site.service.rebuild_runs
    part = await runs.claim(run["id"], "", users[-1], site.now_ms + 3_600_000)
    assert part is not None
    await runs.advance(part, 3, users[-1], site.now_ms)
    running = await look(site, run["id"])
    assert (running["done"], running["rate_per_s"], running["eta_s"]) == (3, None, None)
    await runs.finish(run["id"], "cancelled", site.now_ms, None)
    ended = await look(site, run["id"])
    assert (ended["rate_per_s"], ended["took_s"]) == (None, 0)


async def test_user_ids_of_a_rebuild_are_counted_but_not_shown(site: Live, users: list[str]) -> None:
    run = await start(site, {"user_ids": users})
    answer = await site.client.get("/admin/rebuilds")
    (shown,) = (item for item in answer.json()["rebuilds"] if item["id"] == run["id"])
    assert shown["user_count"] == 3
    assert not any(user in answer.text for user in users)
