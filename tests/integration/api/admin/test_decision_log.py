"""`GET /decisions`: the decision log in pages, as JSON or a line for each decision."""

import json
from typing import Any

import numpy as np
import pytest

from app.api.admin import decisions
from app.bandit.model.inputs import SPEC_V2
from app.features.clock import rfc3339
from tests.integration.api.test_scoring import AT, candidates, consume, decision, score
from tests.support.events import feedback
from tests.support.live import Live, new_user, paths, problem

pytestmark = pytest.mark.both_engines
LINES = {"Accept": "application/x-ndjson"}


async def pages(site: Live, query: str = "") -> list[dict[str, Any]]:
    """All decisions, page by page."""
    found: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = await site.json(f"/decisions?{query}{cursor}")
        found += page["decisions"]
        if page["next_cursor"] is None:
            return found
        cursor = f"&cursor={page['next_cursor']}"


async def test_record_has_all_that_a_decision_was_made_from(own_site: Live) -> None:
    site, user = own_site, new_user()
    made = await score(site, user_id=user, candidates=candidates(4), context={"at": AT}, request_id="r-1")
    await site.send(feedback(user, site.now_ms, tip_id=made["chosen_id"], decision_id=made["decision_id"]))
    await consume(site)
    (record,) = await pages(site)
    explained = await decision(site, made["decision_id"])
    profile, policy, outcome = explained["profile"], explained["policy"], explained["outcome"]
    assert record["profile"] == profile["features"]
    assert record["profile_versions"] == profile["versions"]
    assert record["profile_read_at"] == profile["read_at"]
    assert record["context"] == explained["context"] == {"at": AT}
    assert {name: record[name] for name in ("state_version", "prior_version", "role")} == {
        name: policy[name] for name in ("state_version", "prior_version", "role")
    }
    assert {name: record[name] for name in ("state", "reward", "action", "served_at", "settled_at")} == {
        name: outcome[name] for name in ("state", "reward", "action", "served_at", "settled_at")
    }
    assert (record["state"], record["reward"], record["request_id"]) == ("learned", 1.0, "r-1")
    assert record["candidates"] == candidates(4)
    assert record["candidates"][record["chosen"]]["id"] == record["chosen_id"]
    assert record["champion_pi"] == [item["probability"] for item in explained["candidates"]]
    assert record["challenger_pi"] == [item["probability"] for item in explained["shadow"]["candidates"]]
    # The inputs of each candidate and the contributions that they made.
    assert np.shape(record["phi"]) == (4, SPEC_V2.size)
    for phi, item in zip(record["phi"], explained["candidates"], strict=True):
        by_name = dict(zip(SPEC_V2.names, phi, strict=True))
        assert all(bool(by_name[name]) or part == 0 for name, part in item["contributions"].items())


async def test_pages_have_each_decision_once_in_order(own_site: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "RECORDS_PER_PAGE", 3)
    made = [(await score(own_site, user_id=new_user()))["decision_id"] for _ in range(7)]
    later = [(await score(own_site, user_id=new_user()))["decision_id"] for _ in range(3)]
    database, now_ms = own_site.service.database, own_site.now_ms
    await database.execute("UPDATE tip_scores SET created_at_ms = ?", (now_ms - 1_000,))
    for decision_id in later:
        await database.execute("UPDATE tip_scores SET created_at_ms = ? WHERE decision_id = ?", (now_ms, decision_id))
    found = [record["decision_id"] for record in await pages(own_site)]
    assert found == [*sorted(made), *sorted(later)]
    at = rfc3339(now_ms)
    assert [record["decision_id"] for record in await pages(own_site, f"since={at}")] == sorted(later)
    assert [record["decision_id"] for record in await pages(own_site, f"until={at}")] == sorted(made)


async def test_lines_are_the_same_records_and_link_to_the_next_page(
    own_site: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decisions, "RECORDS_PER_PAGE", 2)
    for _ in range(5):
        await score(own_site, user_id=new_user())
    found, address = [], "/decisions?until=9000-01-01T00:00:00%2B02:00"
    while address:
        answer = await own_site.client.get(address, headers=LINES)
        assert answer.headers["content-type"].startswith("application/x-ndjson")
        assert answer.headers["vary"] == "Accept"
        found += [json.loads(line) for line in answer.text.splitlines()]
        address = answer.links.get("next", {}).get("url", "")
    assert found == await pages(own_site)
    assert len(found) == 5


DAMAGE: list[tuple[str, object]] = [
    ("request", "{"),
    ("request", '{"candidates":[]}'),
    ("request", json.dumps({"candidates": candidates(), "at": None, "profile": {"tip_volume_30d": []}})),
    ("chosen", 99),
    ("theta", b"0"),
    ("theta", bytes(8)),
    ("phi", b""),
    ("champion_scores", bytes(8)),
    ("champion_pi", None),
    ("profile_read", "x"),
]


async def test_damaged_decisions_are_left_out(own_site: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if they fill a page, or are the last ones of a page."""
    site, user = own_site, new_user()
    monkeypatch.setattr(decisions, "RECORDS_PER_PAGE", 2)
    made = sorted([(await score(site, user_id=user))["decision_id"] for _ in range(14)])
    sound = [made[0], made[4], made[5], made[9]]
    damaged = [decision_id for decision_id in made if decision_id not in sound]
    database = site.service.database
    await database.execute("UPDATE tip_scores SET created_at_ms = ?", (site.now_ms,))
    for decision_id, (column, value) in zip(damaged, DAMAGE, strict=True):
        await database.execute(f"UPDATE tip_scores SET {column} = ? WHERE decision_id = ?", (value, decision_id))
        problem(await site.client.get(f"/decisions/{decision_id}"), 404)
    assert [record["decision_id"] for record in await pages(site)] == sound
    lines = await site.client.get("/decisions?until=9000-01-01T00:00:00Z", headers=LINES)
    assert [json.loads(line)["decision_id"] for line in lines.text.splitlines()] == [made[0]]


@pytest.mark.parametrize("damage", ["request = '{'", "champion_pi = NULL"])
async def test_request_is_decided_anew_when_its_decision_is_damaged(own_site: Live, damage: str) -> None:
    site, user = own_site, new_user()
    lost = await score(site, user_id=user, request_id="r-1")
    await site.service.database.execute(f"UPDATE tip_scores SET {damage}")
    again = await score(site, user_id=user, request_id="r-1")
    assert again["decision_id"] != lost["decision_id"]
    assert (await score(site, user_id=user, request_id="r-1")) == again


@pytest.mark.parametrize("at_ms", [-5, -(10**18) + 1, 10**18 - 1])
async def test_pages_go_on_after_any_time(own_site: Live, monkeypatch: pytest.MonkeyPatch, at_ms: int) -> None:
    monkeypatch.setattr(decisions, "RECORDS_PER_PAGE", 1)
    made = sorted([(await score(own_site, user_id=new_user()))["decision_id"] for _ in range(3)])
    await own_site.service.database.execute("UPDATE tip_scores SET created_at_ms = ?", (at_ms,))
    found = [record["decision_id"] for record in await pages(own_site)]
    assert found == (made if at_ms == -5 else []), "a time that no calendar has is damage"


@pytest.mark.parametrize(
    ("query", "path"),
    [
        ("cursor=x", "cursor"),
        ("cursor=5-", "cursor"),
        ("cursor=5-a%0A", "cursor"),
        ("cursor=-5", "cursor"),
        ("cursor=1234567890123456789-a", "cursor"),
        ("since=5", "since"),
        ("since=2026-01-02T00:00:00Z&until=2026-01-01T00:00:00Z", "since"),
        ("n=1", "n"),
    ],
)
async def test_invalid_parameter_is_named(site: Live, query: str, path: str) -> None:
    assert paths(problem(await site.client.get(f"/decisions?{query}"), 400)) == [path]
