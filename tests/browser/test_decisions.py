"""The pages of decisions in a browser: search, paging, and the bars that explain a score."""

import re
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from playwright.async_api import Browser, expect

from app.api.admin import decisions
from app.bandit.model.inputs import SPEC_V2, packed
from tests.integration.api.test_scoring import AT, candidates, consume, score
from tests.support.browser import NARROW, WIDE, Scheme, looks, visiting
from tests.support.decisions import move_to
from tests.support.events import feedback, served
from tests.support.live import API_KEYS, KEYS, Live, new_user
from tests.support.site import ServeSite

EVIL = "<img src=x onerror=alert(1)>"


async def learned(site: Live, user: str, count: int = 8) -> dict[str, Any]:
    """Make decisions that teach the policies, then one of the challenger with weights of both signs; the last one."""
    await site.send(*(served(user, site.now_ms - ago) for ago in range(5)))
    for number in range(count):
        found = await score(site, user_id=user, candidates=candidates(5), context={"at": AT})
        about = {"tip_id": found["chosen_id"], "decision_id": found["decision_id"]}
        action = "completed" if number % 3 else "dismissed"
        await site.send(served(user, site.now_ms, **about), feedback(user, site.now_ms, action, **about))
        await consume(site)
    await move_to(site.service, "ramp", 1.0)
    found = await score(site, user_id=user, candidates=candidates(5), context={"at": AT}, request_id=EVIL)
    await site.service.bandit.maintenance.shadow()
    theta = packed(np.linspace(-0.3, 0.2, SPEC_V2.size))
    await site.service.database.execute(
        "UPDATE tip_scores SET theta = ? WHERE decision_id = ?", (theta, found["decision_id"])
    )
    return found


async def test_page_is_sound_when_there_is_no_decision(own_site: Live, browser: Browser) -> None:
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin")
        await visitor.page.get_by_role("link", name="Decisions", exact=True).click()
        await expect(visitor.page.locator("main")).to_contain_text("No decision has been made yet")
        await expect(visitor.page.locator("nav [aria-current]")).to_have_text("Decisions")
        await visitor.assert_sound()


@looks
async def test_decision_is_found_and_explained(own_site: Live, browser: Browser, scheme: Scheme, width: int) -> None:
    user = new_user()
    found = await learned(own_site, user)
    told = await own_site.json(f"/decisions/{found['decision_id']}")
    async with visiting(browser, own_site, scheme=scheme, width=width, zone="Europe/Berlin") as visitor:
        page = visitor.page
        await visitor.go("/admin/decisions")
        await expect(page.locator("tbody tr")).to_have_count(9)
        first = page.locator("tbody tr").first
        for said in (" UTC (", " here)", user, told["chosen_id"], "lints-v2", "not shown yet"):
            await expect(first).to_contain_text(said)
        await expect(page.locator("tbody tr").nth(1)).to_contain_text("reward")
        await visitor.assert_sound()

        await first.get_by_role("link").first.click()
        await expect(page.get_by_role("heading", level=1)).to_have_text(f"Decision {found['decision_id']}")
        await expect(page.locator("table.bars").first).to_be_visible()
        for said in (EVIL, "lints-v2, the challenger", "learned 8 decisions", AT):
            assert said in await visitor.text()
        ranked = await page.locator("table.stack tbody th .id").all_inner_texts()
        assert ranked == [item["id"] for item in sorted(told["candidates"], key=lambda item: -item["score"])]
        parts = page.locator("details.card")
        await expect(parts).to_have_count(5)
        await expect(parts.first.locator("summary")).to_contain_text("chosen")
        await expect(parts.first.locator("table")).to_be_visible()
        await expect(parts.nth(1).locator("table")).to_be_hidden()
        await visitor.assert_sound()
        for part in await parts.all():
            if await part.get_attribute("open") is None:
                await part.locator("summary").click()
        table = page.get_by_role("table", name=f"Contributions to the score of {told['chosen_id']}")
        await expect(table.get_by_role("row", name=re.compile("^Score: the sum"))).to_be_visible()
        names = await page.locator("table.bars tbody .mono").all_inner_texts()
        assert {"intercept", "hour_sin", "dismissal"} <= set(names)
        await expect(table.get_by_role("row", name=re.compile("^dismissal ×"))).to_be_visible()
        await visitor.assert_sound()

        await page.get_by_role("link", name="all decisions of this user").click()
        await expect(page.get_by_label("User id")).to_have_value(user)
        await expect(page.locator("tbody tr")).to_have_count(9)


async def test_bars_begin_at_the_axis(own_site: Live, browser: Browser) -> None:
    found = await learned(own_site, new_user())
    async with visiting(browser, own_site, width=NARROW) as visitor:
        await visitor.go(f"/admin/decisions/{found['decision_id']}")
        bars = visitor.page.locator("details[open] table.bars tbody tr")
        signs = set()
        for row in await bars.all():
            axis, bar = await row.locator("path").bounding_box(), await row.locator("rect").bounding_box()
            assert axis is not None
            assert bar is not None
            sign = (await row.locator("td.number").inner_text())[0]
            signs.add(sign)
            start = bar["x"] if sign == "+" else bar["x"] + bar["width"]
            assert abs(start - axis["x"] - axis["width"] / 2) < 1.5
        assert signs == {"+", "-"}


async def test_decisions_are_searched_and_paged(
    own_site: Live, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decisions, "LINES_PER_PAGE", 2)
    user = new_user()
    made = [(await score(own_site, user_id=user))["decision_id"] for _ in range(3)]
    await score(own_site, user_id=new_user())
    since = f"{datetime.fromtimestamp(own_site.now_ms / 1000 - 3_600, UTC):%Y-%m-%dT%H:%M}"
    async with visiting(browser, own_site, scripts=False) as visitor:
        page = visitor.page
        await visitor.go("/admin/decisions")
        await page.get_by_label("User id").fill(user)
        await page.get_by_label("From (UTC)").fill(since)
        await page.get_by_role("button", name="Show").click()
        await expect(page).to_have_url(re.compile(f"user_id={user}"))
        await expect(page.locator("tbody tr")).to_have_count(2)
        await page.get_by_role("link", name="Older").click()
        await expect(page.locator("tbody tr")).to_have_count(1)
        await expect(page.locator("tbody tr a").first).to_have_attribute("href", f"/admin/decisions/{made[0]}")
        await expect(page.get_by_label("User id")).to_have_value(user)
        # The browser leaves out seconds that are 0.
        assert (await page.get_by_label("From (UTC)").input_value())[:16] == since
        await page.get_by_role("link", name="Newest").click()
        await expect(page.locator("tbody tr")).to_have_count(2)
        await page.get_by_label("From (UTC)").fill("")
        await page.get_by_label("Until (UTC)").fill(since)
        await page.get_by_role("button", name="Show").click()
        await expect(page.locator("main")).to_contain_text("No decision matches these filters.")
        await page.get_by_role("link", name="Show all").click()
        await expect(page.locator("tbody tr")).to_have_count(2)
        await page.get_by_label("decision id").fill("nope")
        await page.get_by_role("button", name="Show").click()
        await expect(page.locator("main")).to_contain_text("No decision has this id.")
        await page.get_by_label("decision id").fill(made[1])
        await page.get_by_role("button", name="Show").click()
        await expect(page.get_by_role("heading", level=1)).to_have_text(f"Decision {made[1]}")


@pytest.mark.parametrize("width", [NARROW, WIDE])
async def test_form_shows_what_is_wrong(site: Live, browser: Browser, width: int) -> None:
    async with visiting(browser, site, width=width) as visitor:
        await visitor.go("/admin/decisions?user_id=a/b&since=2026-04-25T08:30:00%2B02:00", status=422)
        await expect(visitor.page.get_by_role("alert")).to_contain_text("user_id")
        await expect(visitor.page.get_by_label("User id")).to_have_value("a/b")
        assert (await visitor.page.get_by_label("From (UTC)").input_value())[:16] == "2026-04-25T06:30"
        await visitor.assert_sound()


async def test_session_of_an_admin_opens_the_pages(serve_site: ServeSite, browser: Browser) -> None:
    async with serve_site(api_keys=API_KEYS) as site, visiting(browser, site) as visitor:
        await visitor.go("/admin/decisions")
        await visitor.page.get_by_label("API key").fill(KEYS["admin"])
        await visitor.page.get_by_role("button", name="Sign in").click()
        await expect(visitor.page.get_by_role("heading", level=1)).to_have_text("Decisions")
        await visitor.assert_sound()
