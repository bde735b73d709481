"""`GET /admin/audit`: who did what, when, and what came of it."""

from __future__ import annotations

from typing import Any

import pytest

from app.features.ids import user_hash
from tests.support.live import Live, as_caller, new_user, paths, problem


async def trail(site: Live, **query: object) -> dict[str, Any]:
    answer = await site.client.get("/admin/audit", params={name: str(value) for name, value in query.items()})
    assert answer.status_code == 200, answer.text
    page: dict[str, Any] = answer.json()
    assert page.keys() == {"entries", "next_before"}
    return page


async def written(site: Live, count: int) -> None:
    for number in range(count):
        await site.service.audit_trail.begin(site.now_ms, "ann" if number % 2 else "bob", "erase", f"s{number}", "done")


async def test_action_is_shown_with_everything_that_is_known_of_it(own_site: Live) -> None:
    user = new_user()
    await own_site.client.post(f"/admin/users/{user}/rebuild")
    (entry,) = (await trail(own_site))["entries"]
    assert entry.pop("at").endswith("Z")
    assert entry == {
        "id": 1,
        "actor": "anyone",
        "action": "rebuild",
        "subject": user_hash(user),
        "state": "done",
        "outcome": "done",
    }


async def test_refused_action_is_shown_with_its_reason(own_site: Live) -> None:
    for body in ({"user_ids": ["u"]}, {"user_ids": ["u"]}):
        await own_site.client.post("/admin/rebuilds", json=body)
    newest = (await trail(own_site))["entries"][0]
    assert newest["state"] == "refused"
    assert "of the same scope" in newest["outcome"]


async def test_entries_are_shown_page_by_page_newest_first(own_site: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.api.admin.audit_trail.ENTRIES_PER_PAGE", 2)
    await written(own_site, 6)
    page = await trail(own_site)
    seen = [entry["id"] for entry in page["entries"]]
    while page["next_before"] is not None:
        page = await trail(own_site, before=page["next_before"])
        assert page["entries"]  # a page with a link to more never leads to an empty one
        seen.extend(entry["id"] for entry in page["entries"])
    assert seen == [6, 5, 4, 3, 2, 1]


async def test_entries_are_filtered_and_an_empty_filter_is_none(own_site: Live) -> None:
    await written(own_site, 4)
    assert [entry["actor"] for entry in (await trail(own_site, actor="ann"))["entries"]] == ["ann", "ann"]
    assert [entry["id"] for entry in (await trail(own_site, subject="s1", action="erase"))["entries"]] == [2]
    assert (await trail(own_site, action="nothing"))["entries"] == []
    assert len((await trail(own_site, actor="", action="", subject="", user_id=""))["entries"]) == 4


async def test_user_is_found_by_id_though_the_trail_holds_only_its_hash(own_site: Live) -> None:
    user = new_user("é ") + "🎯"
    await own_site.client.delete(f"/admin/users/{user}")
    await written(own_site, 2)
    (entry,) = (await trail(own_site, user_id=user))["entries"]
    assert (entry["action"], entry["outcome"]) == ("erase", "done, 0 events")
    assert (await trail(own_site, user_id=new_user()))["entries"] == []


@pytest.mark.parametrize(
    ("query", "status", "place"),
    [
        ("user_id=a%2Fb", 422, "user_id"),
        ("user_id=a&subject=b", 422, "user_id"),
        ("before=0", 400, "before"),
        ("before=x", 400, "before"),
        (f"before={2**63}", 400, "before"),
        ("who=ann", 400, "who"),
        ("actor=a&actor=b", 400, "actor"),
    ],
)
async def test_query_is_refused_when_it_is_wrong(site: Live, query: str, status: int, place: str) -> None:
    assert paths(problem(await site.client.get(f"/admin/audit?{query}"), status)) == [place]


async def test_action_names_the_key_that_did_it(keyed: Live) -> None:
    await keyed.client.post("/admin/users/audited/rebuild", headers=as_caller("admin"))
    query = {"user_id": "audited", "actor": "admin"}
    answer = await keyed.client.get("/admin/audit", params=query, headers=as_caller("admin"))
    assert len(answer.json()["entries"]) == 1
