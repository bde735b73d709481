"""Ids that differ only in invisible characters look different on every page. Links and copies keep the id."""

import json
import re
import unicodedata
from html.parser import HTMLParser
from urllib.parse import quote

import httpx
import pytest
from litestar.routes import HTTPRoute
from playwright.async_api import Browser, expect

from app.features.ids import visible
from tests.browser.test_dead_letters import bury, bury_event
from tests.support.browser import visiting
from tests.support.events import served
from tests.support.live import JSON, Live, token_in

HTML = {"Accept": "text/html"}
ODD = "a\u200bd\u202ea \u3164e\u0301⟨ "
# Holds what a program reads, or what a form sends back as it is.
TRUE_TEXT = {"value", "href", "action", "data-copy", "data-complete"}
# What the pages themselves write between digits.
OWN = "\u202f"


class Seen(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self._attributes: list[str] = []
        self._field = False
        self.feed(page)
        self.text += " ".join(self._attributes)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._field = tag == "textarea"
        self._attributes += [value for name, value in attrs if name not in TRUE_TEXT and value]

    def handle_endtag(self, tag: str) -> None:
        self._field = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._field else data


def check(page: httpx.Response) -> str:
    """Check that no character of a page is hidden; the text of the page."""
    assert page.headers["content-type"].startswith("text/html"), page.text
    text = Seen(page.text).text
    hidden = {char for char in text if unicodedata.category(char) in ("Cf", "Co", "Cn", "Zl", "Zp", "Zs")}
    assert hidden <= {" ", OWN}, f"{hidden} on {page.url}"
    assert ODD.strip() not in text
    return text


async def test_no_page_hides_a_character(own_site: Live) -> None:
    site = own_site
    user = quote(ODD, safe="")
    await bury_event(site, ODD)
    await site.send(served(ODD, site.now_ms, tip_id=ODD, event_id=ODD, decision_id=ODD))
    letter = await bury(site, {"user_id": ODD, "odd\u200b": 1}, f"no event: {ODD}", f"ValueError: {ODD}")
    raw = await bury(site, f"no JSON {ODD}")
    await bury(site, {"user_id": ODD, "long": "x" * 2_000})
    because = {"reason": ODD.strip()}
    assert (await site.client.post("/admin/features/preferred_hour/disable", json=because)).status_code == 200
    assert (await site.client.post("/admin/rollout/rollback", json=because)).status_code == 200
    discarded = await bury(site, "{}")
    assert (await site.client.delete(f"/admin/dead-letters/{discarded}", params=because)).status_code == 204
    candidates = [{"id": ODD, "features": {"is_overdue": True, "task_age_days": 1, "priority": 1}}]
    # Without a profile, because a read would fill the cache.
    asked = {"user_id": ODD, "request_id": ODD, "candidates": candidates, "profile_features": None}
    made = await site.json("/score", "POST", json=asked)
    listed = await site.client.post("/admin/rebuilds", json={"user_ids": [ODD]})
    run = listed.json()["id"]
    await site.service.rebuild_runs.finish(run, "failed", site.now_ms, f"cannot compute {ODD}")
    pages = {
        **{path: path for path in ("/admin", "/admin/data-quality", "/admin/rebuilds", "/admin/rollout")},
        **{
            path: path
            for path in ("/admin/dead-letters", "/admin/features", "/admin/keys", "/admin/audit", "/admin/sign-in")
        },
        "/admin/users": f"/admin/users?prefix={quote(ODD[:3])}",
        "/admin/decisions": "/admin/decisions",
        "/admin/decisions/{decision_id}": f"/admin/decisions/{made['decision_id']}",
        "/admin/users/{user_id}": f"/admin/users/{user}",
        "/admin/users/{user_id}/erase": f"/admin/users/{user}/erase",
        "/admin/data-quality/users": "/admin/data-quality/users?feature=tip_volume_30d&state=missing&limit=1",
        "/admin/rebuilds/{run_id}": f"/admin/rebuilds/{run}",
        "/admin/dead-letters/{letter_id}": f"/admin/dead-letters/{letter}",
    }
    without = {"/admin/data-quality/refresh", "/admin/users/{user_id}/development"}
    assert pages.keys() | without == {
        re.sub(r":\w+}", "}", route.path)
        for route in site.app.routes
        if isinstance(route, HTTPRoute) and route.path.startswith("/admin") and "GET" in route.methods
    } - {"/admin/static/{file_path}"}
    texts = {route: check(await site.client.get(path, headers=HTML)) for route, path in pages.items()}
    user_pages = (
        *("/admin/users", "/admin/users/{user_id}", "/admin/users/{user_id}/erase", "/admin/data-quality/users"),
        *("/admin/decisions", "/admin/decisions/{decision_id}"),
    )
    assert [route for route in user_pages if visible(ODD) not in texts[route]] == []
    assert texts["/admin/users/{user_id}"].count(visible(ODD)) >= 5  # title, heading, tip, event, decision
    assert "⟨U+200B⟩" in check(await site.client.get(f"/admin/dead-letters/{raw}", headers=HTML))
    await forms(site, user)


async def forms(site: Live, user: str) -> None:
    start = await site.client.get("/admin/rebuilds", headers=HTML)
    token = {"csrf_token": token_in(start)}
    answers = {
        f"/admin/users/{user}/rebuild": {},
        "/admin/dead-letters/replay": {},
        "/admin/rebuilds": {"scope": "users", "user_ids": f"{ODD}/", "features": "tip_volume_30d"},
        f"/admin/users/{user}/erase/confirm": {"confirm": ODD.strip()},
    }
    for path, form in answers.items():
        answer = await site.client.post(path, data={**token, **form}, headers=HTML)
        assert answer.status_code in (200, 422), answer.text
        check(answer)
    erased = await site.client.post(f"/admin/users/{user}/erase/confirm", data={**token, "confirm": ODD}, headers=HTML)
    assert erased.status_code == 200
    assert visible(ODD) in check(erased)


@pytest.mark.parametrize("path", ["/admin/data-quality/users?state=missing&feature={}", "/admin/users?{}=1"])
async def test_error_page_hides_no_character_of_the_request(own_site: Live, path: str) -> None:
    answer = await own_site.client.get(path.format(quote(ODD)), headers=HTML)
    assert answer.status_code in (400, 422)
    check(answer)


async def test_user_is_erased_when_the_visible_id_is_typed(own_site: Live, browser: Browser) -> None:
    site, twin, odd = own_site, "ada", "ada\u200b "
    await site.send(served(twin, site.now_ms), served(odd, site.now_ms))
    async with visiting(browser, site) as visitor:
        page = visitor.page
        await visitor.go("/admin/users?prefix=ad")
        assert await page.locator(".ids a").all_inner_texts() == [twin, visible(odd)]
        await page.get_by_label("Find a user").press_sequentially("ad")
        options = page.locator("datalist").first.locator("option")
        await expect(options).to_have_count(2)
        assert [await option.get_attribute("label") for option in await options.all()] == [twin, visible(odd)]
        await page.get_by_role("link", name=visible(odd)).click()
        await expect(page.get_by_text("characters that are invisible")).to_be_visible()
        await expect(page.locator("h1 .odd").first).to_have_attribute("title", "zero width space")
        await visitor.assert_sound()
        await page.get_by_role("link", name="Erase this user").click()
        await page.get_by_label("To confirm, type the user's id").fill(twin)
        await visitor.assert_sound()
        await page.get_by_role("button", name="Erase for good").click()
        await expect(page.get_by_role("alert")).to_contain_text("not the id of the user")
        shown = await page.locator("label .id").inner_text()
        await page.get_by_label("To confirm, type the user's id").fill(shown)
        await page.get_by_role("button", name="Erase for good").click()
        await expect(page.get_by_role("heading", name="Erased")).to_contain_text(visible(odd))
    assert (await site.features(odd))["tip_volume_30d"] == 0
    assert (await site.features(twin))["tip_volume_30d"] == 1


async def test_payload_is_copied_as_it_was_sent(own_site: Live, browser: Browser) -> None:
    sent = {"user_id": "ada\u200b ", "tip": "\u202e"}
    letter = await bury(own_site, json.dumps(sent))
    async with visiting(browser, own_site) as visitor:
        await visitor.context.grant_permissions(["clipboard-read", "clipboard-write"])
        await visitor.go(f"/admin/dead-letters/{letter}")
        await expect(visitor.page.get_by_label("Payload", exact=True)).to_contain_text("ada⟨U+200B⟩ ")
        await visitor.page.get_by_role("button", name="Copy").click()
        await expect(visitor.page.get_by_role("button", name="Copied")).to_be_visible()
        assert json.loads(await visitor.page.evaluate("navigator.clipboard.readText()")) == sent


async def test_json_has_the_id_as_it_is(own_site: Live) -> None:
    await own_site.send(served(ODD, own_site.now_ms))
    assert (await own_site.client.get("/admin/users", headers=JSON)).json()["user_ids"] == [ODD]
