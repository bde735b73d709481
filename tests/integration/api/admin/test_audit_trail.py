"""`GET /admin/audit`: actions with actor, time and outcome."""

from typing import Any

import pytest

from app.features.ids import user_hash
from tests.support.live import Live, as_caller, new_user, paths, problem


async def trail(site: Live, **query: object) -> dict[str, Any]:
    page: dict[str, Any] = await site.json("/admin/audit", params=query)
    assert page.keys() == {"entries", "next_before"}
    return page


async def written(site: Live, count: int) -> None:
    for number in range(count):
        await site.service.audit_trail.begin(site.now_ms, "ann" if number % 2 else "bob", "erase", f"s{number}", "done")


async def test_entry_has_all_fields(own_site: Live) -> None:
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


async def test_entry_has_the_reason_when_the_action_was_refused(own_site: Live) -> None:
    for _ in range(2):
        await own_site.client.post("/admin/rebuilds", json={"user_ids": ["u"]})
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


async def test_entries_are_filtered_by_every_filter_that_is_not_empty(own_site: Live) -> None:
    await written(own_site, 4)
    assert [entry["actor"] for entry in (await trail(own_site, actor="ann"))["entries"]] == ["ann", "ann"]
    assert [entry["id"] for entry in (await trail(own_site, subject="s1", action="erase"))["entries"]] == [2]
    assert (await trail(own_site, action="nothing"))["entries"] == []
    assert len((await trail(own_site, actor="", action="", subject="", user_id=""))["entries"]) == 4


async def test_entries_of_a_user_are_found_by_id(own_site: Live) -> None:
    user = new_user("é ") + "🎯"
    await own_site.client.delete(f"/admin/users/{user}")
    await written(own_site, 2)
    (entry,) = (await trail(own_site, user_id=user))["entries"]
    assert (entry["action"], entry["outcome"]) == ("erase", "done, 0 events")
    assert (await trail(own_site, user_id=new_user()))["entries"] == []


async def test_query_is_refused_when_it_is_invalid(site: Live) -> None:
    for query, status, place in (
        ("user_id=a%2Fb", 422, "user_id"),
        ("user_id=a&subject=b", 422, "user_id"),
        *((f"before={before}", 400, "before") for before in ("0", "x", 2**63)),
        ("who=ann", 400, "who"),
        ("actor=a&actor=b", 400, "actor"),
    ):
        assert paths(problem(await site.client.get(f"/admin/audit?{query}"), status)) == [place], query


async def test_entry_names_the_key_of_the_request(keyed: Live) -> None:
    await keyed.client.post("/admin/users/audited/rebuild", headers=as_caller("admin"))
    query = {"user_id": "audited", "actor": "admin"}
    answer = await keyed.client.get("/admin/audit", params=query, headers=as_caller("admin"))
    assert len(answer.json()["entries"]) == 1
