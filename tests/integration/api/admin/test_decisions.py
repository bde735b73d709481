"""`GET /admin/decisions` and `GET /admin/decisions/{decision_id}`: searches, pages, refusals, explanations."""

import re
from typing import Any
from urllib.parse import quote

import pytest

from app.api.admin import decisions
from app.features.clock import rfc3339
from tests.integration.api.test_scoring import AT, candidates, consume, score
from tests.support.events import feedback, served
from tests.support.live import Live, new_user, paths, problem

pytestmark = pytest.mark.both_engines
HTML = {"Accept": "text/html"}
NOTHING = "No decision matches these filters."


async def made(site: Live, user: str, count: int) -> list[str]:
    """Make decisions for a user; their ids, newest first."""
    return [(await score(site, user_id=user))["decision_id"] for _ in range(count)][::-1]


async def date(site: Live, at_ms: int, *decision_ids: str) -> None:
    """Move decisions to another time."""
    for decision_id in decision_ids:
        await site.service.database.execute(
            "UPDATE tip_scores SET created_at_ms = ? WHERE decision_id = ?", (at_ms, decision_id)
        )


async def ids(site: Live, query: str = "") -> list[str]:
    """The ids of a search, page by page."""
    found: list[str] = []
    more = ""
    while True:
        page = await site.json(f"/admin/decisions?{query}{more}")
        found += [line["decision_id"] for line in page["decisions"]]
        if page["next_before"] is None:
            return found
        more = f"&before={page['next_before']}"


async def page_text(site: Live, path: str, status: int = 200) -> str:
    answer = await site.client.get(path, headers=HTML)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("text/html")
    return answer.text


async def test_line_of_a_decision_equals_its_explanation(own_site: Live) -> None:
    site, user = own_site, new_user()
    first = await score(site, user_id=user, candidates=candidates(4), context={"at": AT})
    about = {"tip_id": first["chosen_id"], "decision_id": first["decision_id"]}
    await site.send(served(user, site.now_ms, **about), feedback(user, site.now_ms, "snoozed", **about))
    await consume(site)
    second = await score(site, user_id=user, explore=False)
    answer = await site.client.get("/admin/decisions")
    assert answer.headers["vary"] == "Accept"
    page = answer.json()
    assert page["next_before"] is None
    assert [line["decision_id"] for line in page["decisions"]] == [second["decision_id"], first["decision_id"]]
    for line in page["decisions"]:
        told = await site.json(f"/admin/decisions/{line['decision_id']}")
        assert told == await site.json(f"/decisions/{line['decision_id']}")
        (chosen,) = (item for item in told["candidates"] if item["id"] == told["chosen_id"])
        assert line == {
            **{name: told[name] for name in ("decision_id", "decided_at", "user_id", "chosen_id")},
            **{name: told["outcome"][name] for name in ("state", "reward", "action")},
            "probability": chosen["probability"],
            "role": told["policy"]["role"],
            "served_by": told["policy"]["id"],
        }
    assert [(line["state"], line["reward"]) for line in page["decisions"]] == [("open", None), ("learned", 0.3)]


async def test_pages_have_each_decision_once_newest_first(own_site: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "LINES_PER_PAGE", 3)
    ann, bob = new_user(), new_user()
    of_ann, of_bob = await made(own_site, ann, 7), await made(own_site, bob, 4)
    await date(own_site, own_site.now_ms - 60_000, *of_ann)  # at one moment
    assert await ids(own_site) == [*of_bob, *of_ann]
    assert await ids(own_site, f"user_id={ann}") == of_ann
    assert await ids(own_site, f"user_id={bob}") == of_bob


@pytest.mark.parametrize("of_user", [False, True])
async def test_times_are_a_half_open_interval(own_site: Live, of_user: bool) -> None:
    user = new_user()
    newest, middle, oldest = await made(own_site, user, 3)
    now_ms = own_site.now_ms // 60_000 * 60_000
    for decision_id, ago in ((oldest, 2), (middle, 1), (newest, 0)):
        await date(own_site, now_ms - ago * 60_000, decision_id)
    since, until = rfc3339(now_ms - 60_000), rfc3339(now_ms)
    query = f"user_id={user}&" if of_user else ""
    assert await ids(own_site, f"{query}since={since}") == [newest, middle]
    assert await ids(own_site, f"{query}until={until}") == [middle, oldest]
    assert await ids(own_site, f"{query}since={since}&until={until}") == [middle]
    assert await ids(own_site, f"{query}since={since[:16]}&until={until[:19]}") == [middle], "without offset: UTC"
    assert await ids(own_site, f"{query}since={until}&until={since}") == []


async def test_decision_is_found_by_its_id(own_site: Live) -> None:
    (decision_id,) = await made(own_site, new_user(), 1)
    assert await ids(own_site, f"decision_id={decision_id}&user_id=another") == [decision_id]
    assert await ids(own_site, "decision_id=nope") == []
    found = await own_site.client.get(f"/admin/decisions?decision_id={decision_id}", headers=HTML)
    assert (found.status_code, found.headers["location"]) == (303, f"/admin/decisions/{decision_id}")
    page = await page_text(own_site, "/admin/decisions?decision_id=nope")
    assert "No decision has this id." in page
    assert 'value="nope"' in page
    problem(await own_site.client.get("/admin/decisions/nope"), 404)
    assert "it may have been pruned or erased" in await page_text(own_site, "/admin/decisions/nope", 404)


async def test_page_says_that_nothing_matches(own_site: Live) -> None:
    assert "No decision has been made yet." in await page_text(own_site, "/admin/decisions")
    (decision_id,) = await made(own_site, new_user(), 1)
    for query in (f"user_id={new_user()}", "until=2020-01-01T00:00", "since=9999-12-31T23:59:59Z", "before=0-1"):
        page = await page_text(own_site, f"/admin/decisions?{query}")
        assert NOTHING in page, query
        assert decision_id not in page
    assert decision_id in await page_text(own_site, "/admin/decisions?user_id=&since=&until=&decision_id=")


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("decision_id", "a/b", 422),
        ("user_id", "\x00", 422),
        ("user_id", "x" * 129, 422),
        ("since", "yesterday", 400),
        ("since", "2026-13-01T00:00", 400),
        ("since", "12026-01-01T00:00", 400),
        ("until", "2026-04-25", 400),
        ("before", "", 400),
        ("before", "7", 400),
        ("before", "1-2\n", 400),
        ("before", "1" * 16 + "-2", 400),
    ],
)
async def test_invalid_parameter_is_named(site: Live, name: str, value: str, status: int) -> None:
    address = f"/admin/decisions?{name}={quote(value)}"
    assert paths(problem(await site.client.get(address), status)) == [name]
    page = await page_text(site, address, status)
    assert "Nothing was searched." in page
    assert f'<span class="mono">{name}</span>' in page
    assert 'action="/admin/decisions"' in page, "the form is shown again"


async def test_page_explains_the_score_by_the_same_numbers(own_site: Live) -> None:
    site, user = own_site, new_user()
    for _ in range(6):  # so that the policy has weights
        found = await score(site, user_id=user, context={"at": AT})
        await site.send(
            feedback(user, site.now_ms, "completed", tip_id=found["chosen_id"], decision_id=found["decision_id"])
        )
        await consume(site)
    found = await score(site, user_id=user, candidates=candidates(5), context={"at": AT})
    await site.service.bandit.maintenance.shadow()
    told = await site.json(f"/decisions/{found['decision_id']}")
    page = await page_text(site, f"/admin/decisions/{found['decision_id']}")
    tables = dict(re.findall(r"to the score of ([\w-]+)</caption>(.*?)</table>", page, re.DOTALL))
    assert next(iter(tables)) == told["chosen_id"]
    assert tables.keys() == {item["id"] for item in told["candidates"] if item["probability"] > 0}
    widths: list[tuple[float, float]] = []
    for item in told["candidates"]:
        rows = re.findall(
            r'"mono">(\w+)</span>.*?<svg class="(\w+)".*? width="([\d.]+)".*?<td class="number">(.*?)</td>',
            tables[item["id"]],
            re.DOTALL,
        )
        contributed = {name: part for name, part in item["contributions"].items() if abs(part) >= decisions.LEAST}
        assert {name: text for name, _, _, text in rows} == {n: f"{part:+.4f}" for n, part in contributed.items()}
        assert [sign for _, sign, _, _ in rows] == ["minus" if float(text) < 0 else "plus" for *_, text in rows]
        assert sorted(rows, key=lambda row: -abs(float(row[3]))) == rows, "the largest first"
        assert f"{item['score']:+.4f}</td></tr></tfoot>" in tables[item["id"]]
        widths += [(float(width), abs(float(text))) for _, _, width, text in rows]
    scale = max(width for width, _ in widths) / max(part for _, part in widths)
    assert all(width == pytest.approx(part * scale, abs=0.05) for width, part in widths), "one scale for all bars"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("policy_hash = 'of another release'", "Another release, with other inputs, made this decision."),
        ("challenger_scores = NULL", "The challenger has not ranked them."),
    ],
)
async def test_page_says_what_is_not_known(own_site: Live, change: str, said: str) -> None:
    (decision_id,) = await made(own_site, new_user(), 1)
    await own_site.service.database.execute(f"UPDATE tip_scores SET {change}", ())
    assert said in await page_text(own_site, f"/admin/decisions/{decision_id}")


async def test_decision_without_exploration_is_explained_alone(own_site: Live) -> None:
    found = await score(own_site, user_id=new_user(), explore=False, profile_features=None)
    page = await page_text(own_site, f"/admin/decisions/{found['decision_id']}")
    assert page.count("<details") == 1
    for said in ("the request did not explore", "was made without a profile", "nothing had been learned"):
        assert said in page


async def test_list_shows_a_decision_with_damaged_probabilities(own_site: Live) -> None:
    (decision_id,) = await made(own_site, new_user(), 1)
    await own_site.service.database.execute("UPDATE tip_scores SET champion_pi = ?, chosen = 2", (b"1234567",))
    (line,) = (await own_site.json("/admin/decisions"))["decisions"]
    assert (line["decision_id"], line["probability"]) == (decision_id, None)
    assert decision_id in await page_text(own_site, "/admin/decisions")
    await page_text(own_site, f"/admin/decisions/{decision_id}", 404)


async def test_decisions_of_an_erased_user_are_not_listed(own_site: Live) -> None:
    user: Any = new_user()
    await made(own_site, user, 2)
    assert (await own_site.client.delete(f"/admin/users/{user}")).status_code == 204
    assert await ids(own_site) == []


async def test_page_shows_a_profile_with_an_integer_beyond_any_float(site: Live) -> None:
    made_from = await score(site, user_id=new_user(), profile_features={"tip_volume_30d": 10**400})
    text = await page_text(site, f"/admin/decisions/{made_from['decision_id']}")
    assert "10" + "\u202f000" * 133 in text
